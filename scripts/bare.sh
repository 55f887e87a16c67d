#!/bin/sh
# Try the README's commands on a bare machine: a Debian that debootstrap has just made.
#
#   scripts/bare.sh 12                  make demo, then .ci/run, on Debian 12
#   scripts/bare.sh 13 make demo        some other command, on Debian 13
#
# Needs root and debootstrap. What runs is a fresh clone of the last commit; of packages the
# machine has those that the README asks for (git, make, ca-certificates) and no others.
# Everything happens in mount and pid namespaces of its own: no mount and no process stays behind.
#
#   BARE_DIR        folder for the machines (/var/tmp/fleecenbd-bare)
#   BARE_KEEP=1     leave the used machine in BARE_DIR, to look at
#   DEBIAN_MIRROR   by default the one apt uses here
#
# How this machine reaches package archives (apt's Acquire settings, pip's configuration and the
# local folders it names, certificates, proxies) is read from its configuration and handed on.

set -eu

say() { printf 'bare: %s\n' "$*"; }
fail() { printf 'bare: %s\n' "$*" >&2; exit 1; }

repository=$(cd "$(dirname "$0")/.." && pwd)

# --- inside the namespaces: mount, enter -------------------------------------------------------

if [ "${1:-}" = --inside ]; then
    machine=$2
    shift 2
    mount --bind "$machine" "$machine"
    mount -t proc proc "$machine/proc"
    mount --rbind /sys "$machine/sys"
    mount --rbind /dev "$machine/dev"
    mount -t tmpfs tmpfs "$machine/dev/shm"
    mount -t tmpfs tmpfs "$machine/run"
    while read -r folder; do
        mkdir -p "$machine$folder"
        mount --bind -o ro "$folder" "$machine$folder"
    done <"$machine/bare-folders"
    # Not only chroot: in one, the root is no mount point, and user namespaces are refused.
    cd "$machine"
    mkdir -p outside
    pivot_root . outside
    # shellcheck disable=SC2046
    exec env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        LANG=C.UTF-8 TERM="${TERM:-dumb}" $(env | grep -E '^(PIP_|https?_proxy=|no_proxy=|SSL_CERT_)') \
        chroot . sh -c 'umount -l /outside && cd /root/fleecenbd && exec "$@"' sh "$@"
fi

# --- outside: make the machine, fill it, start the inside --------------------------------------

case "${1:-}" in
    12) codename=bookworm ;;
    13) codename=trixie ;;
    *) fail "usage: scripts/bare.sh 12|13 [COMMAND...]" ;;
esac
version=$1
shift
[ "$(id -u)" = 0 ] || fail "needs root (chroot and mounts)"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"

folder=${BARE_DIR:-/var/tmp/fleecenbd-bare}
pristine=$folder/debian$version
machine=$folder/debian$version-run
mkdir -p "$folder"

if [ ! -e "$pristine/.complete" ]; then
    mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' |
        grep -E '/debian/?$' | head -n 1)}
    [ -n "$mirror" ] || fail "apt names no mirror here: set DEBIAN_MIRROR"
    say "debootstrap $codename from $mirror (minutes)"
    rm -rf "$pristine"
    debootstrap --variant=minbase "$codename" "$pristine" "$mirror" >"$folder/debootstrap.log" ||
        fail "debootstrap failed, see $folder/debootstrap.log"
    touch "$pristine/.complete"
fi

rm -rf "$machine"
cp -a --reflink=auto "$pristine" "$machine"
[ -n "${BARE_KEEP:-}" ] || trap 'rm -rf "$machine"' EXIT

cp /etc/resolv.conf /etc/hosts "$machine/etc/"
apt-config dump | grep -E '^Acquire::(https?|Check|Retries|ForceIPv)' \
    >"$machine/etc/apt/apt.conf.d/90bare" || true
if [ -d /usr/local/share/ca-certificates ]; then
    cp -r /usr/local/share/ca-certificates "$machine/usr/local/share/"
fi
bundle=/etc/ssl/certs/ca-certificates.crt
if [ -e "$bundle" ]; then
    mkdir -p "$machine/etc/ssl/certs"
    cp -L "$bundle" "$machine$bundle"
fi
for file in /etc/pip.conf "$HOME/.config/pip/pip.conf"; do
    [ -e "$file" ] || continue
    case "$file" in
        /etc/*) inside=$machine$file ;;
        *) inside=$machine/root/.config/pip/pip.conf ;;
    esac
    mkdir -p "$(dirname "$inside")"
    cp -L "$file" "$inside"
done
# Folders that pip's settings name, by path or by file: URI. An index's files may lie beside it.
{
    cat /etc/pip.conf "$HOME/.config/pip/pip.conf" 2>/dev/null || true
    env | grep '^PIP_' || true
} | tr ' =,' '\n\n\n' | sed -n 's,^file://,,; s,/simple/*$,,; /^\//p' | sort -u |
    while read -r path; do
        if [ -d "$path" ]; then echo "$path"; fi
    done >"$machine/bare-folders"

git clone --quiet "$repository" "$machine/root/fleecenbd"
say "Debian $version, commit $(git -C "$machine/root/fleecenbd" log -1 --format='%h %s')"

inside() { unshare --mount --propagation private --pid --fork --kill-child \
    sh "$repository/scripts/bare.sh" --inside "$machine" "$@"; }

inside sh -c 'apt-get -qq update &&
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install \
        git make ca-certificates >/dev/null' || fail "apt-get does not work on the machine"

if [ $# -gt 0 ]; then
    say "$*"
    inside "$@" || fail "$* failed on Debian $version"
else
    for command in "make demo" ".ci/run"; do
        say "$command"
        start=$(date +%s)
        # shellcheck disable=SC2086
        inside $command || fail "$command failed on Debian $version"
        say "$command passed in $(($(date +%s) - start)) s"
    done
fi
say "passed on Debian $version"
