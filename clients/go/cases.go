package main

import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
)

// The shared cases: tests/clients/python/cases.py says what stands for what.
type testCase struct {
	Name  string `json:"name"`
	Steps []step `json:"steps"`
	// It is for a server with few keys: one call of a scan sees all of them.
	FewKeys bool `json:"few_keys"`
}

type step struct {
	Send   []string        `json:"send"`
	Expect json.RawMessage `json:"expect"`
	Error  string          `json:"error"`
	Keep   string          `json:"keep"`
	At     *int            `json:"at"`
}

// An error reply as the server has sent it.
type errorReply string

var patterns = map[string]*regexp.Regexp{
	"<position>": regexp.MustCompile(`^\d+-\d+$`),
	"<digits>":   regexp.MustCompile(`^\d+$`),
	"<text>":     regexp.MustCompile(`.`),
}

func readCases() ([]testCase, error) {
	text, err := os.ReadFile(os.Getenv("CASES"))
	if err != nil {
		return nil, err
	}
	var cases []testCase
	err = json.Unmarshal(text, &cases)
	// This runs when others have filled the server.
	return slices.DeleteFunc(cases, func(c testCase) bool { return c.FewKeys }), err
}

func fill(text, prefix string, kept map[string]string) string {
	if name, isKept := strings.CutPrefix(text, "$"); isKept {
		return kept[name]
	}
	return strings.ReplaceAll(text, "~", prefix)
}

// Whether a reply is what is expected, where maps may be flat lists, as they are in RESP2.
func matches(expected, reply any, prefix string, kept map[string]string) bool {
	switch expected := expected.(type) {
	case map[string]any:
		fields := asMap(reply)
		_, open := expected["..."]
		if fields == nil || (!open && len(fields) != len(expected)) {
			return false
		}
		for name, value := range expected {
			found, there := fields[fill(name, prefix, kept)]
			if name != "..." && (!there || !matches(value, found, prefix, kept)) {
				return false
			}
		}
		return true
	case []any:
		items, isList := reply.([]any)
		if !isList || len(items) != len(expected) {
			return false
		}
		for at := range expected {
			if !matches(expected[at], items[at], prefix, kept) {
				return false
			}
		}
		return true
	case float64:
		number, isNumber := reply.(int64)
		return isNumber && float64(number) == expected
	case string:
		return matchesText(expected, reply, prefix, kept)
	}
	return reflect.DeepEqual(expected, reply)
}

func matchesText(expected string, reply any, prefix string, kept map[string]string) bool {
	if !strings.HasPrefix(expected, "<") {
		return reply == fill(expected, prefix, kept)
	}
	if expected == "<any>" {
		return true
	}
	if expected == "<int>" {
		_, isNumber := reply.(int64)
		return isNumber
	}
	if word, isList := strings.CutPrefix(expected, "<list containing "); isList {
		items, _ := reply.([]any)
		for _, item := range items {
			if item == fill(strings.TrimSuffix(word, ">"), prefix, kept) {
				return true
			}
		}
		return false
	}
	text, isText := reply.(string)
	if part, some := strings.CutPrefix(expected, "<text containing "); some {
		return isText && strings.Contains(text, fill(strings.TrimSuffix(part, ">"), prefix, kept))
	}
	return isText && patterns[expected].MatchString(text)
}

func asMap(reply any) map[string]any {
	fields := map[string]any{}
	switch reply := reply.(type) {
	case map[any]any:
		for name, value := range reply {
			fields[fmt.Sprint(name)] = value
		}
		return fields
	case []any:
		if len(reply)%2 != 0 {
			return nil
		}
		for at := 0; at < len(reply); at += 2 {
			fields[fmt.Sprint(reply[at])] = reply[at+1]
		}
		return fields
	}
	return nil
}

// Runs a case. `send` takes commands and returns their replies.
func runCase(c testCase, prefix string, send func([][]any) []any) error {
	kept := map[string]string{}
	for at := 0; at < len(c.Steps); {
		// What can be sent together: nothing that uses what another keeps.
		end := at + 1
		for end < len(c.Steps) && !strings.Contains("\x00"+strings.Join(c.Steps[end].Send, "\x00"), "\x00$") {
			end++
		}
		var commands [][]any
		for _, step := range c.Steps[at:end] {
			var command []any
			for _, word := range step.Send {
				command = append(command, fill(word, prefix, kept))
			}
			commands = append(commands, command)
		}
		replies := send(commands)
		for number, step := range c.Steps[at:end] {
			if err := check(step, replies[number], prefix, kept); err != nil {
				return err
			}
		}
		at = end
	}
	return nil
}

func check(step step, reply any, prefix string, kept map[string]string) error {
	if step.Error != "" {
		text, isError := reply.(errorReply)
		if !isError || !strings.HasPrefix(string(text), fill(step.Error, prefix, kept)) {
			return fmt.Errorf("%v: %#v, expected the error %q", step.Send, reply, step.Error)
		}
		return nil
	}
	var expected any
	if err := json.Unmarshal(step.Expect, &expected); err != nil {
		return err
	}
	if !matches(expected, reply, prefix, kept) {
		return fmt.Errorf("%v: %#v, expected %s", step.Send, reply, step.Expect)
	}
	if list, isList := reply.([]any); step.Keep != "" && isList {
		at := len(list) - 1
		if step.At != nil {
			at = *step.At
		}
		kept[step.Keep] = fmt.Sprint(list[at])
	}
	return nil
}
