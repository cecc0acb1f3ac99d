package main

import (
	"context"
	"fmt"
	"os"
)

// With CASES it runs the conformance cases, otherwise the example.
func main() {
	ctx := context.Background()
	if os.Getenv("CASES") != "" {
		os.Exit(conformance(ctx))
	}
	if err := example(ctx, "127.0.0.1:6380"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
