#!/bin/sh
# A full backup through nbdkit with fleecenbd's engine in it, at a limited rate.
#
#   examples/nbdkit/plugin.sh IMAGE TARGET
#
# For a disk that no guest uses: nbdkit locks the image, so that no guest can be started meanwhile.
# RATE in the environment is the most that is read, in bits a second (400M). TARGET gets its name
# when it is whole and on the disk. Needs nbdkit with its Python plugin, and nbdcopy
# (nbdkit, nbdkit-plugin-python, libnbd-bin).
set -eu

fail() { printf 'plugin: %s\n' "$*" >&2; exit 1; }

[ $# = 2 ] || { echo "usage: $0 IMAGE TARGET" >&2; exit 2; }
image=$1
case $2 in /*) target=$2 ;; *) target=./$2 ;; esac # never taken for an option
if [ -e "$target" ] && [ ! -f "$target" ]; then fail "$2 is there, and not a file"; fi
plugin=$(dirname "$0")/../../plugins/fleece.py     # of a wheel: PREFIX/share/fleecenbd/fleece.py

part=$(mktemp "$target.XXXXXX")
trap 'rm -f "$part"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
export part

# -U -: a socket that nobody else finds. nbdkit ends with the command, and hands on its status.
# Over one disk and a session, $uri is the session's: the disk as it is now.
# shellcheck disable=SC2016  # nbdkit's shell expands them
nbdkit -U - --filter=rate \
    python "$plugin" disk="$image" session=backup rate="${RATE:-400M}" \
    --run 'nbdcopy --flush -- "$uri" "$part"'
mv -f "$part" "$target"
sync "$(dirname "$target")"
