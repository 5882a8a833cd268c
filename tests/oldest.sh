#!/usr/bin/env bash
# Compiles everything, and the smallest part that is used alone, with the oldest Rust that the manifest names, which
# rustup brings; and builds the docs with it, since what they need is compiled then.
set -euo pipefail
cd "$(dirname "$0")/.."

oldest=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
command -v rustup >/dev/null || { echo "install rustup: it brings Rust $oldest, which this crate must compile with" >&2; exit 1; }
rustup toolchain install "$oldest" --profile minimal --no-self-update
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/oldest
cargo "+$oldest" check --workspace --all-features
# What hosts build that start no VMs themselves.
cargo "+$oldest" check --package blockmount-qemu --no-default-features --example foreign_vm
RUSTDOCFLAGS=-Dwarnings cargo "+$oldest" doc --workspace --no-deps --all-features
