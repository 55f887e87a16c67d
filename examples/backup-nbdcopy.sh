#!/bin/sh
# A full backup to a raw file, with nbdcopy.
#
#   examples/backup-nbdcopy.sh URI TARGET
#
# URI is a fleecing export of a running server, which the guest goes on using meanwhile:
#
#   fleecenbd serve vm.raw --begin nightly -U /run/vm.sock
#   examples/backup-nbdcopy.sh 'nbd+unix:///vm@nightly?socket=/run/vm.sock' /backup/vm.raw
#
# For a disk that no guest uses, the server can be the backup's own, and end with it:
#
#   fleecenbd serve vm.raw --begin nightly --run 'examples/backup-nbdcopy.sh "$uri" /backup/vm.raw'
#
# TARGET gets its name when it is whole and on the disk; until then an older backup of that name
# stays. Ranges of zeroes are holes in it. Needs nbdcopy and nbdinfo (libnbd-bin).
set -eu

fail() { printf 'backup-nbdcopy: %s\n' "$*" >&2; exit 1; }

[ $# = 2 ] || { echo "usage: $0 URI TARGET" >&2; exit 2; }
uri=$1
case $2 in /*) target=$2 ;; *) target=./$2 ;; esac # never taken for an option
if [ -e "$target" ] && [ ! -f "$target" ]; then fail "$2 is there, and not a file"; fi

# Only fleecing exports have this meta context. The guest's own export can be read too, but it
# changes meanwhile: what comes of that is no backup.
nbdinfo --map=x-fleecenbd:access "$uri" >/dev/null ||
    fail "$uri is not a fleecing export that can be read (behind nbdkit none can be told)"

part=$(mktemp "$target.XXXXXX") # beside TARGET: a rename does not cross file systems
trap 'rm -f "$part"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -t 2 ]; then set -- --progress; else set --; fi
# --flush: nbdcopy syncs the file before it ends; without it, "done" may still be in memory only.
nbdcopy --flush "$@" "$uri" "$part" >&2 || fail "no backup of $uri (the server's log may say more)"
mv -f "$part" "$target"
sync "$(dirname "$target")" # the new name, too
