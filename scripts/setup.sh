#!/usr/bin/env bash
# Installs what Holdfast needs beside Rust, where it is missing: a Redis, a PostgreSQL, a C compiler.
#
# Debian's packages also start a Redis and a PostgreSQL of the system. Holdfast leaves those alone: `holdfast dev` and the tests start
# their own, on other ports.
set -euo pipefail

packages=()
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || packages+=(redis-server)
{ command -v postgres && command -v initdb; } >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || packages+=(postgresql)
command -v cc >/dev/null || packages+=(gcc libc6-dev)

if ! command -v cargo >/dev/null; then
    echo "Rust is missing: install it from https://rustup.rs, then run this again." >&2
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
