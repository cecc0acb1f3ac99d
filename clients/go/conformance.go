package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

var failed = false

// Prints a line for a check.
func report(name string, err error) {
	if err != nil {
		failed = true
		fmt.Printf("FAIL %s: %v\n", name, err)
		return
	}
	fmt.Printf("ok   %s\n", name)
}

func plain(reply any, err error) any {
	var refused redis.Error
	switch {
	case errors.Is(err, redis.Nil):
		return nil
	case errors.As(err, &refused):
		return errorReply(refused.Error())
	case err != nil:
		return err
	}
	return withoutErrors(reply)
}

// Nil inside of lists is a value, as outside of them.
func withoutErrors(reply any) any {
	switch reply := reply.(type) {
	case []any:
		for at := range reply {
			reply[at] = withoutErrors(reply[at])
		}
	case map[any]any:
		for name := range reply {
			reply[name] = withoutErrors(reply[name])
		}
	case error:
		return plain(nil, reply)
	}
	return reply
}

func conformance(ctx context.Context) int {
	address, proxy := "127.0.0.1:"+os.Getenv("PORT"), "127.0.0.1:"+os.Getenv("PROXY_PORT")
	report("go-redis: the example", example(ctx, address))
	cases, err := readCases()
	report("go-redis: the cases can be read", err)
	for _, protocol := range []int{3, 2} {
		name, prefix := fmt.Sprintf("go-redis RESP%d", protocol), fmt.Sprintf("go%d-", protocol)
		client := redis.NewClient(&redis.Options{Addr: address, Protocol: protocol})
		for _, c := range cases {
			report(name+": "+c.Name, runCase(c, prefix, func(commands [][]any) []any {
				var replies []any
				for _, command := range commands {
					replies = append(replies, plain(client.Do(ctx, command...).Result()))
				}
				return replies
			}))
			report(name+", pipelined: "+c.Name, runCase(c, prefix+"pipe-", func(commands [][]any) []any {
				pipeline := client.Pipeline()
				var results []*redis.Cmd
				for _, command := range commands {
					results = append(results, pipeline.Do(ctx, command...))
				}
				_, _ = pipeline.Exec(ctx)
				var replies []any
				for _, result := range results {
					replies = append(replies, plain(result.Result()))
				}
				return replies
			}))
		}
		client.Close()
	}
	// From here on as in a first program: with nothing but an address.
	client := redis.NewClient(&redis.Options{Addr: address})
	defer client.Close()
	cell := func(column string, run func() error) { report("cell go-redis | "+column, run()) }
	cell("connects", func() error { return client.Ping(ctx).Err() })
	cell("RESP2", func() error { return protocolIs(ctx, address, 2) })
	cell("RESP3", func() error { return protocolIs(ctx, address, 3) })
	cell("pool of 50", func() error { return pool(ctx, address) })
	cell("pipeline of 10,000", func() error { return deep(ctx, client) })
	cell("reconnects", func() error { return reconnects(ctx, client) })
	cell("pub/sub", func() error { return subscribes(ctx, client) })
	cell("error words", func() error { return words(ctx, client, proxy) })
	cell("logs in", func() error { return logsIn(ctx) })
	cell("one effect", func() error { return oneEffect(ctx, client, proxy) })
	cell("without REQUEST=3", func() error { return effects(ctx, client, proxy, 3) })
	if failed {
		return 1
	}
	return 0
}

func protocolIs(ctx context.Context, address string, protocol int) error {
	client := redis.NewClient(&redis.Options{Addr: address, Protocol: protocol})
	defer client.Close()
	info, err := client.Do(ctx, "CLIENT", "INFO").Text()
	if err == nil && !strings.Contains(info, fmt.Sprintf(" resp=%d ", protocol)) {
		err = errors.New(info)
	}
	return err
}

func pool(ctx context.Context, address string) error {
	client := redis.NewClient(&redis.Options{Addr: address, PoolSize: 50})
	defer client.Close()
	if err := client.Do(ctx, "STOCK.SET", "go-pool", 5000).Err(); err != nil {
		return err
	}
	var all sync.WaitGroup
	problems := make(chan error, 50)
	for range 50 {
		all.Go(func() {
			for range 20 {
				if err := client.Do(ctx, "STOCK.DECR", "go-pool", 1).Err(); err != nil {
					problems <- err
					return
				}
			}
		})
	}
	all.Wait()
	close(problems)
	if err := <-problems; err != nil {
		return err
	}
	return available(ctx, client, "go-pool", 4000)
}

func available(ctx context.Context, client *redis.Client, product string, expected int64) error {
	found, err := client.Do(ctx, "STOCK.GET", product).Int64()
	if err == nil && found != expected {
		err = fmt.Errorf("%d are left, expected %d", found, expected)
	}
	return err
}

func deep(ctx context.Context, client *redis.Client) error {
	if err := client.Do(ctx, "STOCK.SET", "go-deep", 20000).Err(); err != nil {
		return err
	}
	pipeline := client.Pipeline()
	for range 10000 {
		pipeline.Do(ctx, "STOCK.DECR", "go-deep", 1)
	}
	if _, err := pipeline.Exec(ctx); err != nil {
		return err
	}
	return available(ctx, client, "go-deep", 10000)
}

func reconnects(ctx context.Context, client *redis.Client) error {
	if err := client.Do(ctx, "CLIENT", "KILL", "SKIPME", "yes").Err(); err != nil {
		return err
	}
	for range 5 {
		if err := client.Ping(ctx).Err(); err != nil {
			return err
		}
	}
	return nil
}

// Hears an event of a product that is sold out and restocked again and again.
func subscribes(ctx context.Context, client *redis.Client) error {
	if err := client.Do(ctx, "STOCK.SET", "go-event", 1).Err(); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	subscription := client.Subscribe(bounded, "stock:events:go-event")
	defer subscription.Close()
	if _, err := subscription.Receive(bounded); err != nil {
		return err
	}
	heard, sold := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			err := client.Do(ctx, "STOCK.DECR", "go-event", 1).Err()
			if err == nil {
				err = client.Do(ctx, "STOCK.INCR", "go-event", 1).Err()
			}
			select {
			case <-heard:
				sold <- err
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	message, err := subscription.ReceiveMessage(bounded)
	close(heard)
	if err := errors.Join(err, <-sold); err != nil {
		return err
	}
	var event struct {
		Event, Product, Position string
		Available                int
	}
	err = json.Unmarshal([]byte(message.Payload), &event)
	expected, known := map[string]int{"soldout": 0, "back": 1}[event.Event]
	if err != nil || !known || event.Available != expected || event.Product != "go-event" || !patterns["<position>"].MatchString(event.Position) {
		return fmt.Errorf("%v %s", err, message.Payload)
	}
	return subscription.Ping(bounded)
}

func refusedWith(word string, err error) error {
	var refused redis.Error
	if !errors.As(err, &refused) || !strings.HasPrefix(refused.Error(), word+" ") {
		return fmt.Errorf("not a redis.Error that begins with %s: %v", word, err)
	}
	return nil
}

// Each of these the proxy says once. After LOADING and TRYAGAIN go-redis itself sends the command again.
func words(ctx context.Context, client *redis.Client, proxy string) error {
	if err := refusedWith("NOTFOUND", client.Do(ctx, "STOCK.INCR", "go-unknown", 1).Err()); err != nil {
		return err
	}
	through := redis.NewClient(&redis.Options{Addr: proxy})
	defer through.Close()
	if err := through.Ping(ctx).Err(); err != nil {
		return err
	}
	for _, word := range []string{"LOADING", "TRYAGAIN", "INDOUBT"} {
		product := strings.ToLower(word) + "-go"
		if err := client.Do(ctx, "STOCK.SET", product, 1).Err(); err != nil {
			return err
		}
		if word == "INDOUBT" {
			if err := refusedWith(word, through.Do(ctx, "STOCK.DECR", product, 1, "REQUEST", product).Err()); err != nil {
				return err
			}
		}
		reply, err := through.Do(ctx, "STOCK.DECR", product, 1, "REQUEST", product).Slice()
		if err != nil || reply[0] != "OK" {
			return fmt.Errorf("%v %w", reply, err)
		}
	}
	return nil
}

func logsIn(ctx context.Context) error {
	for _, protocol := range []int{2, 3} {
		options := func(user, password string) *redis.Options {
			return &redis.Options{Addr: "127.0.0.1:" + os.Getenv("USERS_PORT"), Protocol: protocol, Username: user, Password: password}
		}
		user, password := os.Getenv("LOGIN_USER"), os.Getenv("LOGIN_PASSWORD")
		known, nobody, wrong := redis.NewClient(options(user, password)), redis.NewClient(options("", "")), redis.NewClient(options(user, "wrong"))
		err := errors.Join(
			known.Do(ctx, "STOCK.INCR", "users", 1).Err(),
			refusedWith("NOPERM", known.Do(ctx, "STOCK.SET", "users", 1).Err()),
			refusedWith("NOAUTH", nobody.Do(ctx, "STOCK.GET", "users").Err()),
			refusedWith("WRONGPASS", wrong.Do(ctx, "STOCK.GET", "users").Err()),
			known.Close(), nobody.Close(), wrong.Close(),
		)
		if err != nil {
			return err
		}
	}
	return nil
}

// The connection is lost twice after each command was executed; go-redis itself sends it again.
func oneEffect(ctx context.Context, client *redis.Client, proxy string) error {
	if err := client.Do(ctx, "STOCK.SET", "go-lost", 100).Err(); err != nil {
		return err
	}
	through := redis.NewClient(&redis.Options{Addr: proxy})
	defer through.Close()
	for number := range 100 {
		if err := through.Do(ctx, "STOCK.DECR", "go-lost", 1, "REQUEST", fmt.Sprintf("go-lost-%d", number)).Err(); err != nil {
			return err
		}
	}
	return available(ctx, client, "go-lost", 0)
}

// The same without a REQUEST: the command takes effect each time that go-redis sends it.
func effects(ctx context.Context, client *redis.Client, proxy string, expected int64) error {
	through := redis.NewClient(&redis.Options{Addr: proxy})
	defer through.Close()
	for number := range 100 {
		product := fmt.Sprintf("bare-go-%d", number)
		if err := client.Do(ctx, "STOCK.SET", product, 10, "ACK", "redis").Err(); err != nil {
			return err
		}
		if err := through.Do(ctx, "STOCK.DECR", product, 1).Err(); err != nil {
			return err
		}
		if err := available(ctx, client, product, 10-expected); err != nil {
			return err
		}
		if err := client.Do(ctx, "STOCK.DEL", product, "ACK", "redis").Err(); err != nil {
			return err
		}
	}
	return nil
}
