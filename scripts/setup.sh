#!/usr/bin/env bash
# Installs what Holdfast needs beside Rust, where it is missing: a Redis, a PostgreSQL, a C compiler. `setup.sh clients`,
# `setup.sh fuzz` and `setup.sh bench` also install what those need.
#
# Debian's packages also start a Redis and a PostgreSQL of the system. Holdfast leaves those alone: `holdfast dev` and the tests start
# their own, on other ports.
set -euo pipefail

packages=()
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || packages+=(redis-server)
{ command -v postgres && command -v initdb; } >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || packages+=(postgresql)
command -v cc >/dev/null || packages+=(gcc libc6-dev)
# What the tests with clients of other languages need.
if [ "${1:-}" = clients ]; then
    command -v node >/dev/null && command -v npm >/dev/null || packages+=(nodejs npm)
    python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3 python3-venv)
    # Go, Java and Maven are large, and used where they are there.
    [ -e /usr/include/hiredis/hiredis.h ] || packages+=(libhiredis-dev)
    command -v redis_exporter >/dev/null || command -v prometheus-redis-exporter >/dev/null || packages+=(prometheus-redis-exporter)
fi
# What libFuzzer is built with.
if [ "${1:-}" = fuzz ]; then
    command -v c++ >/dev/null || packages+=(g++)
fi
# What the benchmark needs. Java and Maven are used where they are there: they are large, and serve one of its comparisons.
if [ "${1:-}" = bench ]; then
    command -v redis-benchmark >/dev/null || packages+=(redis-tools)
    command -v haproxy >/dev/null || packages+=(haproxy)
    command -v valgrind >/dev/null || packages+=(valgrind)
    command -v node >/dev/null && command -v npm >/dev/null || packages+=(nodejs npm)
    python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3 python3-venv)
fi

if ! command -v cargo >/dev/null; then
    echo "Rust is missing: install it from https://rustup.rs, then run this again." >&2
    exit 1
fi
needed=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$(dirname "$0")/../Cargo.toml")
found=$(cargo --version | cut -d ' ' -f 2)
if [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -n 1)" != "$needed" ]; then
    echo "Rust $found is too old: Holdfast needs $needed or newer. Run 'rustup update', then run this again." >&2
    exit 1
fi
if [ ${#packages[@]} -eq 0 ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "Missing, under the names that Debian gives them: ${packages[*]}. Install them, then run this again." >&2
    exit 1
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "Run this as root, then again as yourself: apt-get install ${packages[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi
echo "Installing ${packages[*]}"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
