#!/bin/sh
# Try the README's commands on a bare machine: a Debian that debootstrap has just made.
#
#   scripts/bare.sh 12                  make demo, then .ci/run, on Debian 12
#   scripts/bare.sh 13 make demo        some other command, on Debian 13
#
# Needs root; debootstrap is installed where it is missing. What runs is a fresh clone of the last
# commit; of packages the machine has those that the README asks for (git, make, ca-certificates)
# and no others. The Debian that debootstrap made is kept; each run has a copy of it.
#
#   BARE_DIR        folder for the machines (/var/tmp/fleecenbd-bare); a run takes 3 GiB of it
#   BARE_KEEP=1     leave the used machine in BARE_DIR, to look at
#   DEBIAN_MIRROR   by default the one apt uses here

set -eu

who=bare
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/debian-folder.sh
. "$repository/scripts/debian-folder.sh"

if [ "${1:-}" = --inside ]; then
    machine=$2
    shift 2
    mount_folder "$machine"
    mount -t tmpfs tmpfs "$machine/dev/shm"
    enter "$machine" /root/fleecenbd "$@"
fi

case "${1:-}" in
    12) codename=bookworm ;;
    13) codename=trixie ;;
    *) fail "usage: scripts/bare.sh 12|13 [COMMAND...]" ;;
esac
version=$1
shift
need_root

folder=${BARE_DIR:-/var/tmp/fleecenbd-bare}
mkdir -p "$folder"
pristine=$(cd "$folder" && pwd)/debian$version
machine=$pristine-run
lock exclusive "$pristine.lock"

if [ ! -e "$pristine.made" ]; then
    make_folder "$codename" "$pristine"
    touch "$pristine.made"
fi

inside() { alone sh "$repository/scripts/bare.sh" --inside "$machine" "$@"; }

rm -rf --one-file-system "$machine"
[ -n "${BARE_KEEP:-}" ] || trap 'rm -rf --one-file-system "$machine"' EXIT
trap 'exit 1' HUP INT TERM
cp -a --reflink=auto "$pristine" "$machine"
hand_on "$machine"
git clone --quiet "$repository" "$machine/root/fleecenbd"
say "Debian $version, commit $(git -C "$machine/root/fleecenbd" log -1 --format='%h %s')"

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
