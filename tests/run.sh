#!/usr/bin/env bash
# Everything that must hold, on a fresh Debian machine with cargo: installs what the tests need, then
# runs formatting, lints, docs and every test. Tests on real devices need root; without it this asks sudo.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(id -u)" -ne 0 ]; then
  exec sudo --preserve-env=PATH,CARGO_HOME,RUSTUP_HOME,CARGO_TARGET_DIR,CI "$0" "$@"
fi

say() { printf '\n== %s\n' "$*"; }

# Everything is built once: what would let a second build be faster only costs time and room.
export CARGO_INCREMENTAL=0

say "tools"
tests/setup.sh

say "formatting"
cargo fmt --all -- --check

say "lints"
cargo clippy --workspace --all-targets --all-features -- -D warnings

say "docs"
RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps --all-features

say "the oldest Rust that the manifest names"
oldest=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
if [ "$(rustc --version | cut -d. -f1,2)" != "rustc $oldest" ]; then
  command -v rustup >/dev/null || { echo "install rustup: it brings Rust $oldest, which this crate must compile with" >&2; exit 1; }
  rustup toolchain install "$oldest" --profile minimal --no-self-update
  CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/oldest cargo "+$oldest" check --workspace --all-features
fi

# The tests mostly wait for devices, and leave the time to this build, which has a directory of its own.
windows_log=$(mktemp)
setsid tests/windows.sh >"$windows_log" 2>&1 &
windows=$!
# With all that it has started, should a test fail first.
trap 'kill -- "-$windows" 2>/dev/null || true; rm -f "$windows_log"' EXIT

say "tests"
cargo test --workspace --all-features

say "benches, each once and untimed"
cargo test --package blockmount --package blockmount-verity --package blockmount-vpmem --benches

say "Windows, under Wine"
wait "$windows" || { cat "$windows_log" >&2; exit 1; }
cat "$windows_log"

say "all of it holds"
