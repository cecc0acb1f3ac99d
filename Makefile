# Everything builds with the release profile: tests, lints and programs share one build of the dependencies.

.DEFAULT_GOAL := help
.PHONY: help setup build run demo test test-clients test-sabotage fuzz bench lint fmt docs

# short: a smoke test of the benchmark; full: numbers to publish.
BENCH ?= full

help: ## Shows this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Installs Redis and PostgreSQL, where they are missing
	@scripts/setup.sh

build: setup ## Builds target/release/holdfast
	cargo build --release --locked

run: build ## Serves on 127.0.0.1:6380, on a private Redis and PostgreSQL
	./target/release/holdfast dev

demo: build ## Shows what it does, against the server that `make run` started
	cargo run --release --locked --example demo

test: setup ## Runs every test
	cargo test --release --locked

test-clients: build ## Runs the clients of other languages against it; ONLY=locks/ for those of locks
	tests/clients/run

test-sabotage: setup ## Shows that builds which break a promise fail the tests
	tests/sabotage

fuzz: ## Fuzzes what reads bytes from outside, a minute each; FUZZ=nightly for ten
	@scripts/setup.sh fuzz
	scripts/fuzz.sh

bench: ## Measures it; BENCH=short for a minute, BENCH_ONLY=hot-p16 for one case, UPDATE=1 for new counts
	@scripts/setup.sh bench
	BENCH=$(BENCH) HOLDFAST_TEST_FSYNC=1 cargo bench --locked

lint: ## Checks format and lints
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings

fmt: ## Formats the code
	cargo fmt

docs: ## Writes anew what is made from the code: the example file, the tables in the README
	UPDATE_DOCS=1 cargo test --release --locked --test docs
