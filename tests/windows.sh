#!/usr/bin/env bash
# Builds blockmount-hcs and what it stands on for Windows, and runs its tests there, which here is Wine. Wine has no
# Hyper-V, so a stand-in for the library of the Host Compute Service is built too; the calls, handles and callbacks are
# real. rustup brings the standard library for Windows.
#
#   tests/windows.sh [build]
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'tests/windows.sh: %s\n' "$*" >&2; exit 1; }

# A file of each package, and the package.
needed=(
  /usr/bin/x86_64-w64-mingw32-gcc:gcc-mingw-w64-x86-64
  /usr/lib/wine/wine64:wine64
)
missing=()
for need in "${needed[@]}"; do
  [ -e "${need%%:*}" ] || missing+=("${need##*:}")
done
if [ "${#missing[@]}" -gt 0 ]; then
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  sudo=()
  if [ "$(id -u)" -ne 0 ]; then sudo=(sudo --preserve-env=DEBIAN_FRONTEND); fi
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

target=x86_64-pc-windows-gnu
command -v rustup >/dev/null || fail "install rustup: it brings the standard library for $target"
rustup target add "$target"
# Not the usual place: a build that runs beside this one would wait for it.
work="$(cargo metadata --format-version=1 --no-deps |
  sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/windows"
mkdir -p "$work/dll"
log="$work/build.log"

say "the stand-ins"
for library in computecore bcryptprimitives; do
  x86_64-w64-mingw32-gcc -std=c11 -O1 -Wall -Wextra -Werror -shared -nostartfiles \
    -Wl,--entry=0 -Wl,--enable-stdcall-fixup -o "$work/dll/$library.dll" \
    "backends/hcs/tests/windows/$library.c" -lkernel32 -ladvapi32
done

say "building for $target"
cargo test --no-run --package blockmount-hcs --target "$target" --target-dir "$work" >"$log" 2>&1 ||
  { tail -n 60 "$log" >&2; fail "the build for Windows fails; all of it is in $log"; }
if grep -q '^warning: ' "$log"; then
  cat "$log" >&2
  fail "the build for Windows has warnings"
fi
mapfile -t tests < <(sed -n 's/^ *Executable .*(\(.*\.exe\))$/\1/p' "$log")
[ "${#tests[@]}" -ge 3 ] || fail "only ${#tests[@]} programs of tests were built"
[ "${1-}" != build ] || exit 0

export WINEPREFIX="$work/prefix" WINEDEBUG=-all WINEPATH="Z:${work//\//\\}\\dll"
# No desktop, no menus, and none of the parts that Wine would download.
export WINEDLLOVERRIDES="winemenubuilder.exe,mscoree,mshtml=" DISPLAY=
wine=/usr/lib/wine/wine64
server=/usr/lib/wine/wineserver64
[ -x "$server" ] || server=/usr/lib/wine/wineserver
clean_up() {
  "$server" -k 2>/dev/null || true
  "$server" -w 2>/dev/null || true
  rm -rf "$WINEPREFIX"
}
trap clean_up EXIT
rm -rf "$WINEPREFIX"
say "wine"
mkdir -p "$WINEPREFIX"
# One server for all programs: one that ends with the last program may still be on its way out when the next one comes, and
# cuts it off.
"$server" -p
timeout 300 "$wine" wineboot --init >"$work/wine.log" 2>&1 ||
  { tail "$work/wine.log" >&2; fail "wine cannot be set up"; }
printf '%s\n' "$("$wine" --version)"

# Cargo names what it has built from here; tests run in the directory of their package.
run() { (program="$(realpath "$1")" && shift && cd backends/hcs && timeout 600 "$wine" "$program" "$@"); }

say "the tests, under Wine"
passed=0
for test in "${tests[@]}"; do
  name="$(basename "$test" | sed 's/-[0-9a-f]*\.exe$//')"
  if ! run "$test" --color never >"$work/test.log" 2>&1; then
    cat "$work/test.log" >&2
    # Wine's own connection to its server, and no test of ours.
    grep -q '^wine client error' "$work/test.log" || fail "$name fails under Wine"
    echo "once more, because Wine has lost its server" >&2
    run "$test" --color never >"$work/test.log" 2>&1 ||
      { cat "$work/test.log" >&2; fail "$name fails under Wine"; }
  fi
  count="$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$work/test.log" | tail -n1)"
  [ -n "$count" ] || { cat "$work/test.log" >&2; fail "$name has not said how it ended"; }
  printf '%4d  %s\n' "$count" "$name"
  passed=$((passed + count))
done
# Otherwise something has left out what only Windows has.
[ "$passed" -ge 35 ] || fail "only $passed tests ran"

say "the documents of one attach, mount, unmount, unplug and detach"
documents="$work/documents.log"
rm -f "$documents"
for test in "${tests[@]}"; do
  case "$test" in */integration-*)
    HCS_STAND_IN_LOG="Z:${documents//\//\\}" run "$test" --exact windows_calls::one_of_each >/dev/null 2>&1 ||
      fail "one_of_each fails with a log" ;;
  esac
done
cat "$documents"
[ "$(wc -l <"$documents")" -eq 5 ] || fail "these are not five documents"

say "$passed tests ran under Wine, and passed"
