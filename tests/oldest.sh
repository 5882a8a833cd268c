#!/usr/bin/env bash
# With the oldest Rust that the manifest names, which rustup brings: lints, or the docs and the smallest part that is used alone.
# What its clippy accepts compiles with it; newer ones know more lints, which are for whoever works with them.
#
#   tests/oldest.sh lints|docs
set -euo pipefail
cd "$(dirname "$0")/.."

oldest=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
command -v rustup >/dev/null || { echo "install rustup: it brings Rust $oldest, which this crate must compile with" >&2; exit 1; }
rustup toolchain install "$oldest" --profile minimal --component clippy --no-self-update
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/oldest
case $1 in
  lints) cargo "+$oldest" clippy --workspace --all-targets --all-features -- -D warnings ;;
  docs)
    RUSTDOCFLAGS=-Dwarnings cargo "+$oldest" doc --workspace --no-deps --all-features
    # What hosts build that start no VMs themselves.
    cargo "+$oldest" clippy --package blockmount-qemu --no-default-features --example foreign_vm -- -D warnings
    ;;
esac
