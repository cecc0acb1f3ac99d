// Clients that add to a number in a file, each under one lock of Holdfast: see ../locks/race.py. "wake", port, name, clients: prints how
// many ms after each release the next one had the lock, see ../locks/wake.py.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

func main() {
	if os.Args[1] == "wake" {
		wake()
		return
	}
	port, file, name := os.Args[1], os.Args[2], os.Args[3]
	clients, _ := strconv.Atoi(os.Args[4])
	total, _ := strconv.Atoi(os.Args[5])
	ctx := context.Background()
	begin := make(chan struct{})
	var added atomic.Int64
	var connected, done sync.WaitGroup
	for range clients {
		connected.Add(1)
		done.Add(1)
		go func() {
			defer done.Done()
			client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + port, PoolSize: 1, MaxRetries: -1, ReadTimeout: 2 * time.Minute})
			check(client.Ping(ctx).Err())
			connected.Done()
			<-begin
			for {
				reply, err := client.Do(ctx, "LOCK.ACQUIRE", name, "WAIT", 60000).Slice()
				check(err)
				if reply[0] != "ACQUIRED" {
					check(fmt.Errorf("LOCK.ACQUIRE: %v", reply))
				}
				more := add(file, total)
				if more {
					added.Add(1)
				}
				reply, err = client.Do(ctx, "LOCK.RELEASE", name, reply[1]).Slice()
				check(err)
				if reply[0] != "RELEASED" {
					check(fmt.Errorf("LOCK.RELEASE: %v", reply))
				}
				if !more {
					return
				}
			}
		}()
	}
	connected.Wait()
	fmt.Println("ready")
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	check(err)
	close(begin)
	done.Wait()
	fmt.Println(added.Load())
}

func wake() {
	name := os.Args[3]
	count, err := strconv.Atoi(os.Args[4])
	check(err)
	ctx := context.Background()
	acquire := func() (*redis.Client, any) {
		client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + os.Args[2], PoolSize: 1, MaxRetries: -1, ReadTimeout: 12 * time.Minute})
		reply, err := client.Do(ctx, "LOCK.ACQUIRE", name, "LEASE", 600000, "WAIT", 600000).Slice()
		check(err)
		if reply[0] != "ACQUIRED" {
			check(fmt.Errorf("LOCK.ACQUIRE: %v", reply))
		}
		return client, reply[1]
	}
	first, token := acquire()
	waits := make(chan time.Duration, count)
	var released atomic.Int64
	begin := time.Now()
	release := func(client *redis.Client, token any) {
		released.Store(int64(time.Since(begin)))
		check(client.Do(ctx, "LOCK.RELEASE", name, token).Err())
	}
	for range count {
		go func() {
			client, token := acquire()
			wait := time.Since(begin) - time.Duration(released.Load())
			release(client, token)
			// Behind the release: with the last of them the program ends.
			waits <- wait
		}()
	}
	// Until all of them wait.
	for waiting := int64(0); waiting < int64(count); time.Sleep(10 * time.Millisecond) {
		info, err := first.Do(ctx, "LOCK.INFO", name).Result()
		check(err)
		waiting = info.(map[any]any)["waiters"].(int64)
	}
	release(first, token)
	for range count {
		fmt.Println((<-waits).Seconds() * 1000)
	}
}

// Adds one to the number in the file, unless it is there already.
func add(file string, total int) bool {
	text, err := os.ReadFile(file)
	check(err)
	number, err := strconv.Atoi(strings.TrimSpace(string(text)))
	check(err)
	if number >= total {
		return false
	}
	check(os.WriteFile(file, []byte(strconv.Itoa(number+1)), 0o644))
	return true
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
