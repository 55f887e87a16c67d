#!/bin/sh
# A Linux kernel, its modules and a busybox for the guests of tests/guest, in a folder that is kept.
#
#   scripts/guest-kernel.sh      prints the folder: vmlinuz, modules/, busybox
#
# The folder is $FLEECENBD_GUEST; by default guest in fleecenbd in the user's cache directory. What
# is there already is left alone: remove the folder to get the kernel anew. Debian's packages are
# downloaded and unpacked, never installed, so root is needed only where apt-get knows no packages.

set -eu

say() { printf 'guest-kernel: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

folder=${FLEECENBD_GUEST:-${XDG_CACHE_HOME:-$HOME/.cache}/fleecenbd/guest}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

# Of two that start at once, one waits, and then finds everything there.
exec 9>"$folder/.lock"
flock 9

if [ -e "$folder/.complete" ]; then
    printf '%s\n' "$folder"
    exit 0
fi

for command in apt-get apt-cache dpkg-deb; do
    command -v "$command" >/dev/null 2>&1 ||
        fail "$command is missing: the guest's kernel comes from Debian's packages. Elsewhere, put vmlinuz, modules/, busybox and an empty .complete into $folder"
done

work=$(mktemp -d "$folder/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# The package of this name holds nothing but the name of the newest kernel's.
newest_kernel() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1
}

download() {
    kernel=$(newest_kernel)
    [ -n "$kernel" ] || return 1
    say "downloading $kernel and busybox-static"
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$kernel" busybox-static >&2)
}

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
download || { update && download; } ||
    fail "linux-image-cloud-amd64 and busybox-static could not be downloaded"

mkdir "$work/root"
for package in "$work"/*.deb; do
    dpkg-deb -x "$package" "$work/root"
done

# one PATH...: the one of them that exists; Debian 13 has moved /bin and /lib into /usr.
one() {
    for path; do
        [ -e "$path" ] && { printf '%s\n' "$path"; return 0; }
    done
    fail "the packages hold none of: $*"
}

rm -rf "$folder/vmlinuz" "$folder/modules" "$folder/busybox"
mv "$(one "$work"/root/boot/vmlinuz-*)" "$folder/vmlinuz"
mv "$(one "$work"/root/lib/modules/* "$work"/root/usr/lib/modules/*)" "$folder/modules"
mv "$(one "$work/root/bin/busybox" "$work/root/usr/bin/busybox")" "$folder/busybox"
chmod a+r "$folder/vmlinuz"
touch "$folder/.complete"
printf '%s\n' "$folder"
