#!/bin/sh
# Set up a machine for fleecenbd.
#
#   scripts/setup.sh base    what the server and the demo need, and .venv
#   scripts/setup.sh tools   what the tests and the benchmarks need besides
#   scripts/setup.sh lint    what looks at the shell scripts
#   scripts/setup.sh peers   what makes a Debian in a folder (scripts/peers.sh, scripts/bare.sh)
#
# Looks for commands and Python modules, not for packages: what is there in whatever way is left
# alone. What is missing is installed by apt-get (Debian 12 and 13, and what descends from them),
# as root or through sudo; elsewhere the names are printed and the rest is the user's choice.
#
# The venv is made by the distribution's own python3 with --system-site-packages: libnbd's Python
# module comes as a package of the distribution, for that interpreter, and from nowhere else.

set -eu

cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

missing=""

# need PACKAGE COMMAND...: each command must be found, or the package is wanted.
need() {
    package=$1
    shift
    for command; do
        command -v "$command" >/dev/null 2>&1 || { missing="$missing $package"; return; }
    done
}

# need_module PACKAGE MODULE: python3 must be able to import it.
need_module() {
    [ -x /usr/bin/python3 ] && (cd / && /usr/bin/python3 -c "import $2") >/dev/null 2>&1 ||
        missing="$missing $1"
}

install_missing() {
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null 2>&1 ||
        fail "these packages (by their Debian names) are missing:$missing. Install them, then run make again."
    if [ "$(id -u)" = 0 ]; then
        as_root=""
    elif command -v sudo >/dev/null 2>&1; then
        as_root="sudo"
    else
        fail "run this as root, then make again:  apt-get install$missing"
    fi
    say "installing$missing"
    # A lock held by unattended upgrades is waited for, and nothing is asked.
    options="-qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0"
    # shellcheck disable=SC2086
    $as_root apt-get $options update ||
        fail "apt-get update failed: is the network there? Needed:$missing"
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get $options install --yes --no-install-recommends $missing >/dev/null ||
        fail "apt-get could not install$missing"
}

base() {
    [ -x /usr/bin/python3 ] || missing="$missing python3"
    need_module python3-venv ensurepip
    need_module python3-libnbd nbd
    need libnbd-bin nbdcopy nbdinfo
    need e2fsprogs mkfs.ext4
    install_missing
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "/usr/bin/python3 is older than 3.11"
    if [ -e .venv/.place ] && [ "$(cat .venv/.place)" != "$(pwd -P)" ]; then
        say "the checkout was moved: .venv is made anew"
        rm -rf .venv
    fi
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        say "making .venv"
        /usr/bin/python3 -m venv --clear --system-site-packages .venv
    fi
    say "installing fleecenbd and its development tools into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    .venv/bin/python -c 'import nbd' || fail ".venv cannot import libnbd's module nbd"
    pwd -P >.venv/.place
    say "ready: .venv/bin/fleecenbd"
}

tools() {
    need fio fio
    need qemu-utils qemu-img qemu-io
    need qemu-system-common qemu-storage-daemon
    need qemu-system-x86 qemu-system-x86_64
    need nbdkit nbdkit
    # A plugin is no command; nbdkit knows whether it can load it.
    nbdkit python --version >/dev/null 2>&1 || missing="$missing nbdkit-plugin-python"
    need gnutls-bin certtool psktool
    need systemd systemd-socket-activate systemd-analyze
    need libvirt-clients virsh virt-xml-validate
    need libxml2-utils xmllint
    need git git
    need graphviz dot
    need xfsprogs mkfs.xfs
    need btrfs-progs mkfs.btrfs
    install_missing
    # What fleecenbd depends on, as wheels: a test installs it into an environment without network.
    .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --wheel-dir .venv/wheels .
    say "tools ready"
}

lint() {
    need shellcheck shellcheck
    install_missing
}

peers() {
    need debootstrap debootstrap
    need mount mount umount
    need util-linux unshare pivot_root flock
    # Without its keys debootstrap takes whatever an archive says; with none of these it can't look.
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"
    command -v sqv >/dev/null 2>&1 || need gpgv gpgv
    install_missing
}

case "${1:-}" in
    base) base ;;
    tools) tools ;;
    lint) lint ;;
    peers) peers ;;
    *) fail "usage: scripts/setup.sh base|tools|lint|peers" ;;
esac
