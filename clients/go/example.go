// Holdfast from Go, with go-redis: `go run .` after `make run`.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Change sends a command that changes something, and returns its outcome: element 0 tells which. Every try carries the same
// REQUEST, so that there is one effect at most, also where go-redis itself sends it again.
func Change(ctx context.Context, client *redis.Client, command ...any) ([]any, error) {
	command = append(command, "REQUEST", rand.Text())
	var err error
	for range 5 {
		var reply any
		reply, err = client.Do(ctx, command...).Result()
		if err == nil {
			return reply.([]any), nil
		}
		var refused redis.Error
		if errors.As(err, &refused) && !mayBeRetried(refused) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%v was not answered, ask again with the same REQUEST: %w", command, err)
}

func mayBeRetried(refused redis.Error) bool {
	for _, word := range []string{"LOADING ", "TRYAGAIN ", "INDOUBT "} {
		if strings.HasPrefix(refused.Error(), word) {
			return true
		}
	}
	return false
}

func example(ctx context.Context, address string) error {
	client := redis.NewClient(&redis.Options{Addr: address})
	defer client.Close()
	if _, err := Change(ctx, client, "STOCK.SET", "go-mug", 10); err != nil {
		return err
	}
	sold, err := Change(ctx, client, "STOCK.DECR", "go-mug", 3)
	if err != nil {
		return err
	}
	fmt.Println(sold[0], sold[1]) // OK 7
	refusal, err := Change(ctx, client, "STOCK.DECR", "go-mug", 8)
	if err != nil {
		return err
	}
	fmt.Println(refusal...) // INSUFFICIENT go-mug 7
	if fmt.Sprint(sold[:2], refusal) != "[OK 7] [INSUFFICIENT go-mug 7]" {
		return fmt.Errorf("%v %v", sold, refusal)
	}
	return nil
}
