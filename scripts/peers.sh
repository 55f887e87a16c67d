#!/bin/sh
# Run a command among newer peers: in a Debian with later NBD clients than this system's.
#
#   scripts/peers.sh trixie                                     make the folder, or bring it up to date
#   scripts/peers.sh trixie python -m pytest tests/interop      run something in it
#
# The folder is a Debian 13 made by debootstrap, with the packages of scripts/peers.list (QEMU 10,
# libnbd 1.22, nbdkit 1.42, fio), and Python 3.13 with fleecenbd and its development tools in a
# venv. It is kept and used again; when the list, pyproject.toml or this script has changed, it is
# brought up to date first. The checkout appears in it as /fleecenbd, and /tmp is the machine's own,
# so that what a failed test leaves can be looked at. Server, clients and tests all run in there:
# nothing of this system's Python or libnbd takes part, so a Debian 13 makes the folder as well.
#
# Needs root; debootstrap is installed where it is missing. Any number may use the folder at once;
# a run waits while it is being made, and an update waits for those who use it.
#
#   PEERS_DIR       where the folder is (the user's cache: $XDG_CACHE_HOME or ~/.cache, fleecenbd)
#   DEBIAN_MIRROR   by default the one apt uses here

set -eu

who=peers
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/debian-folder.sh
. "$repository/scripts/debian-folder.sh"

if [ "${1:-}" = --inside ]; then
    root=$2
    shift 2
    mount_folder "$root"
    mount --bind /tmp "$root/tmp"
    mkdir -p "$root/fleecenbd"
    mount --bind "$repository" "$root/fleecenbd"
    enter "$root" /fleecenbd env PATH="/opt/venv/bin:$plain_path" "$@"
fi

case "${1:-}" in
    trixie) codename=$1 ;;
    *) fail "usage: scripts/peers.sh trixie [COMMAND...]" ;;
esac
shift
need_root

folder=${PEERS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/fleecenbd}
mkdir -p "$folder"
# Beside it: .made when debootstrap has ended, .ready when it holds all it should, .lock, .log.
root=$(cd "$folder" && pwd)/$codename

inside() { alone sh "$repository/scripts/peers.sh" --inside "$root" "$@"; }

# What an update that was killed has left half installed is finished first.
install_packages() {
    say "installing the peers"
    # shellcheck disable=SC2046,SC2016
    inside sh -c 'export DEBIAN_FRONTEND=noninteractive; apt="apt-get -qq -y -o Dpkg::Use-Pty=0"
        { dpkg --configure -a && $apt update && $apt --fix-broken install &&
          $apt --no-install-recommends install "$@" && $apt clean; } >/dev/null' \
        sh $(sed 's/#.*//' "$repository/scripts/peers.list")
}

install_fleecenbd() {
    say "installing fleecenbd and its development tools"
    inside sh -c 'python3 -m venv --clear --system-site-packages /opt/venv &&
        python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
            --editable ".[dev]"'
}

# The mark .filling is what a run that was killed in the middle leaves.
fill() {
    touch "$root.filling"
    filled=yes
    { hand_on "$root" && install_packages && install_fleecenbd; } || filled=no
    rm "$root.filling"
    [ "$filled" = yes ]
}

wanted() { (cd "$repository" && cat pyproject.toml scripts/peers.* scripts/debian-folder.sh) | cksum; }

is_ready() { [ "$(cat "$root.ready" 2>/dev/null)" = "$(wanted)" ]; }

anew() {
    rm -f "$root.made" "$root.filling"
    make_folder "$codename" "$root"
    touch "$root.made"
}

bring_up_to_date() {
    # As it is now: what changes meanwhile is for the next time.
    goal=$(wanted)
    rm -f "$root.ready"
    [ -e "$root.made" ] || anew
    # A whole folder is not thrown away for a network that is down or a name that is misspelt.
    if [ -e "$root.filling" ]; then
        fill || { anew && fill; }
    else
        fill
    fi || fail "apt-get or pip fails in $root: is the network there, and are the names in" \
        "scripts/peers.list right? To have it made anew, remove $root.made"
    printf '%s\n' "$goal" >"$root.ready"
    say "ready: $root"
}

# Any number may use the folder at once; who changes it is alone.
lock shared "$root.lock"
until is_ready; do
    lock exclusive "$root.lock"
    is_ready || bring_up_to_date
    lock shared "$root.lock"
done
[ $# -eq 0 ] || inside "$@"
