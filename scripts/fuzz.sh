#!/usr/bin/env bash
# Fuzzes what reads bytes from outside: each target for a minute, for ten with FUZZ=nightly, for as long as FUZZ_SECONDS says. What it finds is
# kept in fuzz/corpus, what fails in fuzz/artifacts. Installs cargo-fuzz and nightly Rust where they are missing.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${FUZZ:-short}" in
    short) seconds=60 ;;
    nightly) seconds=600 ;;
    *) echo "FUZZ is short or nightly" >&2; exit 64 ;;
esac
seconds=${FUZZ_SECONDS:-$seconds}

rustup toolchain list | grep -q '^nightly' || rustup toolchain install nightly --profile minimal
# Not optimised: it only starts others.
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked --debug cargo-fuzz --version 0.13.2

for target in request entry; do
    echo "==> fuzzing $target for $seconds s"
    mkdir -p "fuzz/corpus/$target"
    cargo +nightly fuzz run "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -dict="fuzz/$target.dict" -max_len=20000 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1
done
