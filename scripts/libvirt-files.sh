#!/bin/sh
# What Debian's libvirt runs QEMU with, in a folder that is kept: for tests/examples/test_libvirt.py.
#
#   scripts/libvirt-files.sh     prints the folder: what is in Debian's packages, under their paths
#
# The packages are those of the libvirt that virsh is from. They are downloaded and unpacked, never
# installed: no daemon is started, and no user is made. The folder is libvirt-VERSION in fleecenbd in
# the user's cache directory; what is there already is left alone.

set -eu

say() { printf 'libvirt-files: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

for command in virsh apt-get dpkg-deb; do
    command -v "$command" >/dev/null 2>&1 ||
        fail "$command is missing: make tools installs virsh; the others are Debian's"
done

# The driver, the program that runs a guest without a daemon, and AppArmor's abstraction; the helper
# that writes AppArmor profiles; AppArmor's parser.
packages="libvirt-daemon-driver-qemu libvirt-daemon-system libvirt-daemon apparmor"

folder=${XDG_CACHE_HOME:-$HOME/.cache}/fleecenbd/libvirt-$(virsh --version)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

# Of two that start at once, one waits, and then finds everything there.
exec 9>"$folder/.lock"
flock 9

if [ -e "$folder/.complete" ]; then
    printf '%s\n' "$folder"
    exit 0
fi

work=$(mktemp -d "$folder/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# shellcheck disable=SC2086
download() { (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download $packages >&2); }

update() {
    if [ "$(id -u)" = 0 ]; then
        apt-get -qq -o DPkg::Lock::Timeout=300 update >&2
    elif command -v sudo >/dev/null 2>&1; then
        sudo apt-get -qq -o DPkg::Lock::Timeout=300 update >&2
    else
        fail "apt-get does not know the packages; run this as root, then go on:  apt-get update"
    fi
}

# Lists of packages that are old name versions that are gone.
download || { update && download; } || fail "$packages could not be downloaded"
for package in "$work"/*.deb; do
    dpkg-deb -x "$package" "$folder"
done
touch "$folder/.complete"
printf '%s\n' "$folder"
