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
# A panic names its line without it, and nobody looks at the programs of this run with a debugger.
export CARGO_PROFILE_DEV_DEBUG=0
# One more than there are processors: a test waits for the kernel or a guest for a part of its time.
export RUST_TEST_THREADS=$(($(nproc) + 1))

say "tools"
tests/setup.sh all

say "formatting"
cargo fmt --all -- --check

# The tests mostly wait for devices, and leave the time to what only compiles, in directories of its own. Until
# they are built, it waits for them. What is fuzzed has been built then. Of a session of its own, the kernel counts the niceness of
# its group alone (sched(7), "The autogroup feature"). What runs under Wine has deadlines, and gets as much time as the other tests.
builds_log=$(mktemp)
setsid bash -c '
  niceness() { { echo "$1" >/proc/self/autogroup; renice -n "$1" -p $$; } >/dev/null 2>&1 || true; }
  niceness 19
  tests/oldest.sh lints && tests/oldest.sh docs && tests/windows.sh build &&
  printf "\n== benches, each once and untimed\n" && cargo test --workspace --all-features --bench "*" &&
  printf "\n== fuzzing\n" &&
  RUST_TEST_THREADS=4 BLOCKMOUNT_FUZZ_SECONDS=30 cargo test --workspace --all-features --test targets --test service -- fuzz:: &&
  niceness 0 && tests/windows.sh' >"$builds_log" 2>&1 &
builds=$!
# With all that it has started, should a test fail first.
trap 'kill -- "-$builds" 2>/dev/null || true; rm -f "$builds_log"' EXIT

say "tests; beside them the lints of the oldest Rust that the manifest names, docs, benches, fuzzing, and Windows under Wine"
# All of them, so that one run says all that is wrong.
failed=
cargo test --workspace --all-features --no-fail-fast || failed="tests"

say "lints; docs; benches; fuzzing; Windows, under Wine"
# Nothing is left that they would disturb, and beside what else the machine does they would get next to nothing.
{ echo 0 >"/proc/$builds/autogroup"; renice -n 0 -g "$builds"; } >/dev/null 2>&1 || true
wait "$builds" || failed="$failed lints, docs, benches, fuzzing or Windows"
cat "$builds_log"

[ -z "$failed" ] || { say "failed: $failed"; exit 1; }
say "all of it holds"
