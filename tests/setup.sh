#!/usr/bin/env bash
# Installs what the tests and the demo use, where it is missing: the tools that make filesystems.
set -euo pipefail

# A command of each package, and the package.
needed=(
  mkfs.ext4:e2fsprogs
  mkfs.xfs:xfsprogs
  mkfs.erofs:erofs-utils
  mksquashfs:squashfs-tools
  sfdisk:fdisk
  losetup:mount
  setpriv:util-linux
  cc:gcc
)

export PATH="$PATH:/usr/sbin:/sbin"
missing=()
for need in "${needed[@]}"; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
if [ "${#missing[@]}" -eq 0 ]; then
  echo "all tools are here"
  exit 0
fi

echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
sudo=()
if [ "$(id -u)" -ne 0 ]; then sudo=(sudo --preserve-env=DEBIAN_FRONTEND); fi
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
