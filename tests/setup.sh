#!/usr/bin/env bash
# Installs what the tests and the demo use, where it is missing: the tools that make filesystems, QEMU, and a kernel
# for its guests. The kernel is only unpacked, to /var/lib/blockmount/kernel: this machine never boots it.
#
#   tests/setup.sh [all]    all: also what only the tests use, such as a browser
set -euo pipefail

# A command of each package, and the package.
needed=(
  mkfs.ext4:e2fsprogs
  mkfs.xfs:xfsprogs
  mkfs.erofs:erofs-utils
  mkfs.btrfs:btrfs-progs
  mkfs.f2fs:f2fs-tools
  mkfs.vfat:dosfstools
  mkfs.exfat:exfatprogs
  mkudffs:udftools
  mksquashfs:squashfs-tools
  sfdisk:fdisk
  losetup:mount
  setpriv:util-linux
  cpio:cpio
  qemu-system-x86_64:qemu-system-x86
  qemu-img:qemu-utils
  veritysetup:cryptsetup-bin
  cc:gcc
)
for_tests=(
  openssl:openssl
  protoc:protobuf-compiler
  runc:runc
  busybox:busybox-static
  chromium-headless-shell:chromium-headless-shell
)
case ${1:-} in
  '') ;;
  all) needed+=("${for_tests[@]}") ;;
  *) echo "tests/setup.sh: $1 is not known; say all, or nothing" >&2; exit 2 ;;
esac
kernel=/var/lib/blockmount/kernel

export PATH="$PATH:/usr/sbin:/sbin"
missing=()
for need in "${needed[@]}"; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
if [ "${1:-}" = all ]; then
  # A client of the Mounts service, which is not ours.
  /usr/bin/python3 -c 'import grpc, google.protobuf' 2>/dev/null || missing+=(python3-grpcio python3-protobuf)
  [ -f /usr/include/google/protobuf/empty.proto ] || missing+=(libprotobuf-dev)
  # The letters of plots.
  [ -n "$(find /usr/share/fonts -name '*.ttf' -print -quit 2>/dev/null)" ] || missing+=(fonts-dejavu-core)
fi
have_kernel=yes
[ -f "$kernel/vmlinuz" ] && [ -d "$kernel/modules" ] || have_kernel=no
if [ "${#missing[@]}" -eq 0 ] && [ "$have_kernel" = yes ]; then
  echo "all tools are here"
  exit 0
fi

export DEBIAN_FRONTEND=noninteractive
sudo=()
if [ "$(id -u)" -ne 0 ]; then sudo=(sudo --preserve-env=DEBIAN_FRONTEND); fi
"${sudo[@]}" apt-get update -qq
if [ "${#missing[@]}" -gt 0 ]; then
  echo "installing ${missing[*]}"
  "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if [ "$have_kernel" = no ]; then
  # The package of this name has nothing in it but the name of the newest one.
  package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
  echo "fetching a kernel for guests: $package"
  room=$(mktemp -d)
  trap 'rm -rf "$room"' EXIT
  chmod 755 "$room"
  (cd "$room" && apt-get -o APT::Sandbox::User=root download -qq "$package" >/dev/null)
  dpkg -x "$room"/*.deb "$room/unpacked"
  "${sudo[@]}" rm -rf "$kernel.new" "$kernel"
  "${sudo[@]}" mkdir -p "$kernel.new"
  "${sudo[@]}" cp "$room"/unpacked/boot/vmlinuz-* "$kernel.new/vmlinuz"
  for modules in "$room"/unpacked/lib/modules/* "$room"/unpacked/usr/lib/modules/*; do
    if [ -d "$modules" ]; then "${sudo[@]}" cp -r "$modules" "$kernel.new/modules"; fi
  done
  # Whole or not at all: what is there is taken for complete.
  "${sudo[@]}" mv "$kernel.new" "$kernel"
fi
