#!/bin/sh
# Run a command among newer peers: in a Debian with later NBD clients than this system's.
#
#   scripts/peers.sh trixie                                     make the folder, or bring it up to date
#   scripts/peers.sh trixie python -m pytest tests/interop      run something in it
#
# The folder is a Debian 13 made by debootstrap, with QEMU 10, libnbd 1.22, nbdkit 1.42, fio, and
# Python 3.13 with fleecenbd and its development tools in a venv. It is kept and used again. The
# checkout appears in it as /fleecenbd, and /tmp is the machine's own, so that what a failed test
# leaves can be looked at. Server, clients and tests all run in there: nothing of this system's
# Python or libnbd takes part.
#
# Needs root and debootstrap. Everything runs in mount and pid namespaces of its own: no mount and
# no process stays behind.
#
#   PEERS_DIR       where the folder is (the user's cache: $XDG_CACHE_HOME or ~/.cache, fleecenbd)
#   DEBIAN_MIRROR   by default the one apt uses here
#
# How this machine reaches package archives (apt's Acquire settings, pip's configuration and the
# local folders it names, certificates, proxies) is read from its configuration and handed on.

set -eu

say() { printf 'peers: %s\n' "$*"; }
fail() { printf 'peers: %s\n' "$*" >&2; exit 1; }

repository=$(cd "$(dirname "$0")/.." && pwd)
packages="python3 python3-venv python3-libnbd libnbd-bin nbdkit nbdkit-plugin-python qemu-utils
    qemu-system-common qemu-system-x86 fio e2fsprogs git make ca-certificates"

# --- inside the namespaces: mount, enter -------------------------------------------------------

if [ "${1:-}" = --inside ]; then
    root=$2
    shift 2
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount --bind /tmp "$root/tmp"
    mount -t tmpfs tmpfs "$root/run"
    mount --bind "$repository" "$root/fleecenbd"
    while read -r folder; do
        mkdir -p "$root$folder"
        mount --bind -o ro "$folder" "$root$folder"
    done <"$root/outside-folders"
    # Not only chroot: in one, the root is no mount point, and user namespaces are refused.
    cd "$root"
    mkdir -p outside
    pivot_root . outside
    # shellcheck disable=SC2046
    exec env -i HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" ${CI:+CI="$CI"} \
        PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        $(env | grep -E '^(PIP_|https?_proxy=|no_proxy=|SSL_CERT_)') \
        sh -c 'umount -l /outside && cd /fleecenbd && exec "$@"' sh "$@"
fi

# --- outside: make the folder, keep it up to date, start the inside ----------------------------

case "${1:-}" in
    trixie) codename=$1 ;;
    *) fail "usage: scripts/peers.sh trixie [COMMAND...]" ;;
esac
shift
[ "$(id -u)" = 0 ] || fail "needs root (chroot and mounts)"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"

folder=${PEERS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/fleecenbd}
root=$folder/$codename
mkdir -p "$folder"

inside() {
    unshare --mount --propagation private --pid --fork --kill-child \
        sh "$repository/scripts/peers.sh" --inside "$root" "$@"
}

debootstrap_once() {
    [ ! -e "$root.bare" ] || return 0
    mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' |
        grep -E '/debian/?$' | head -n 1)}
    [ -n "$mirror" ] || fail "apt names no Debian mirror here: set DEBIAN_MIRROR"
    say "debootstrap $codename from $mirror (minutes)"
    rm -rf "$root"
    debootstrap --variant=minbase "$codename" "$root" "$mirror" >"$folder/debootstrap.log" ||
        fail "debootstrap failed, see $folder/debootstrap.log"
    touch "$root.bare"
}

hand_on_configuration() {
    mkdir -p "$root/fleecenbd" "$root/etc/ssl/certs"
    cp /etc/resolv.conf /etc/hosts "$root/etc/"
    apt-config dump | grep -E '^Acquire::(https?|Check|Retries|ForceIPv)' \
        >"$root/etc/apt/apt.conf.d/90outside" || true
    if [ -d /usr/local/share/ca-certificates ]; then
        cp -r /usr/local/share/ca-certificates "$root/usr/local/share/"
    fi
    bundle=/etc/ssl/certs/ca-certificates.crt
    if [ -e "$bundle" ]; then cp -L "$bundle" "$root$bundle"; fi
    mkdir -p "$root/root/.config/pip"
    for file in /etc/pip.conf .config/pip/pip.conf; do
        case "$file" in
            /*) if [ -e "$file" ]; then cp -L "$file" "$root$file"; fi ;;
            *) if [ -e "$HOME/$file" ]; then cp -L "$HOME/$file" "$root/root/$file"; fi ;;
        esac
    done
    # Folders that pip's settings name, by path or by file: URI. An index's files may lie beside it.
    {
        cat /etc/pip.conf "$HOME/.config/pip/pip.conf" 2>/dev/null || true
        env | grep '^PIP_' || true
    } | tr ' =,' '\n\n\n' | sed -n 's,^file://,,; s,/simple/*$,,; /^\//p' | sort -u |
        while read -r path; do
            if [ -d "$path" ]; then echo "$path"; fi
        done >"$root/outside-folders"
}

install() {
    say "installing the peers"
    # shellcheck disable=SC2086
    inside sh -c 'apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
        -o Dpkg::Use-Pty=0 --no-install-recommends install "$@" >/dev/null' sh $packages ||
        fail "apt-get does not work in $root"
    say "installing fleecenbd and its development tools"
    inside sh -c 'python3 -m venv --system-site-packages /opt/venv &&
        python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
            --editable ".[dev]"' || fail "pip does not work in $root"
}

(
    # One at a time; who comes second finds it done.
    flock 9
    wanted=$(cat "$repository/pyproject.toml" "$repository/scripts/peers.sh" | cksum)
    [ "$(cat "$root.ready" 2>/dev/null)" != "$wanted" ] || exit 0
    debootstrap_once
    hand_on_configuration
    install
    echo "$wanted" >"$root.ready"
    say "ready: $root"
) 9>"$folder/$codename.lock"

[ $# -eq 0 ] || inside "$@"
