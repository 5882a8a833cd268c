#!/usr/bin/env bash
# README's commands on a fresh Debian, with nothing installed but cargo: a root file system made for it, in a mount
# namespace of its own. By hand: it downloads Debian, and compiles all of it once more. Needs root, debootstrap and about 6 GiB.
#
#   tests/fresh_debian.sh [SUITE]     bookworm by default; from the mirror that this machine's apt uses
#
# The toolchain is that of this machine (rustup's, read-only), and so is the configuration of cargo, such as the registry.
set -euo pipefail

suite=${1:-bookworm}
source=$(cd "$(dirname "$0")/.." && pwd)
[ "$(id -u)" -eq 0 ] || { echo "run it as root" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "install debootstrap first: apt-get install debootstrap" >&2; exit 1; }

# What this machine has, as absolute paths: they are the same inside.
toolchain=$(dirname "$(dirname "$(rustup which cargo 2>/dev/null || readlink -f "$(command -v cargo)")")")
cargo_home=${CARGO_HOME:-$HOME/.cargo}
mirror=${MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)}
root=$(mktemp -d -p "${TMPDIR:-/var/tmp}" fresh-debian.XXXXXX)

inside() {
  # A namespace of its own takes all mounts along, however this ends.
  unshare --mount --pid --fork --propagation private bash -euo pipefail -c '
    root=$1 toolchain=$2 cargo_home=$3 source=$4; shift 4
    mount --rbind /dev "$root/dev"; mount -t proc proc "$root/proc"; mount -t sysfs sysfs "$root/sys"
    mount -t tmpfs run "$root/run"
    mkdir -p "$root$toolchain" "$root/cargo" "$root/source"
    mount --bind -o ro "$toolchain" "$root$toolchain"
    mount --bind "$source" "$root/source"
    for name in config.toml config credentials.toml; do
      if [ -f "$cargo_home/$name" ]; then install -m 600 "$cargo_home/$name" "$root/cargo/$name"; fi
    done
    # Whom this machine trusts, its registry may need.
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    exec chroot "$root" env -i HOME=/root TERM=dumb LANG=C.UTF-8 CARGO_HOME=/cargo CARGO_TARGET_DIR=/target \
      PATH="$toolchain/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
      $(env | grep -E "^(CARGO_REGISTR|CARGO_HTTP|CARGO_NET|CARGO_SOURCE|SSL_CERT|https?_proxy|HTTPS?_PROXY)" || true) "$@"
  ' inside "$root" "$toolchain" "$cargo_home" "$source" "$@"
}

say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

trap 'rm -rf --one-file-system "$root"' EXIT
say "Debian $suite from $mirror"
# A linker is what cargo itself needs; it comes with it in Debian.
debootstrap --variant=minbase --include=ca-certificates,gcc,libc6-dev "$suite" "$root" "$mirror" >"$root.log" || {
  tail "$root.log" >&2
  exit 1
}
rm -f "$root.log"
say "tests/setup.sh"
inside bash -c 'cd /source && tests/setup.sh'
say "cargo build"
inside bash -c 'cd /source && cargo build --bin blockmount'
say "cargo run -- demo"
inside bash -c 'cd /source && cargo run -- demo'
say "cargo run -- demo --guest qemu"
inside bash -c 'cd /source && cargo run -- demo --guest qemu'
say "README's commands work on a fresh Debian $suite"
