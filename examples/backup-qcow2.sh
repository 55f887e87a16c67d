#!/bin/sh
# A full backup to a qcow2 file, with qemu-img.
#
#   examples/backup-qcow2.sh URI TARGET
#
# URI is a fleecing export of a running server, which the guest goes on using meanwhile:
#
#   fleecenbd serve vm.raw --begin nightly -U /run/vm.sock
#   examples/backup-qcow2.sh 'nbd+unix:///vm@nightly?socket=/run/vm.sock' /backup/vm.qcow2
#
# For a disk that no guest uses, the server can be the backup's own, and end with it:
#
#   fleecenbd serve vm.raw --begin nightly --run 'examples/backup-qcow2.sh "$uri" /backup/vm.qcow2'
#
# TARGET gets its name when it is whole and on the disk; until then an older backup of that name
# stays. Needs nbdinfo (libnbd-bin) and qemu-img (qemu-utils; in a checkout `make tools` installs
# it).
set -eu

fail() { printf 'backup-qcow2: %s\n' "$*" >&2; exit 1; }

[ $# = 2 ] || { echo "usage: $0 URI TARGET" >&2; exit 2; }
uri=$1
case $2 in /*) target=$2 ;; *) target=./$2 ;; esac # never taken for an option, nor for a protocol
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

if [ -t 2 ]; then set -- -p; else set --; fi
# -f raw: the disk's bytes as they are. Without it qemu-img looks into them for a format, and a
# guest that wrote a qcow2 header to its disk would have a say in what is backed up.
# -c would compress.
qemu-img convert -f raw -O qcow2 "$@" "$uri" "$part" >&2 ||
    fail "no backup of $uri (the server's log may say more)"
sync "$part" # qemu-img does not
mv -f "$part" "$target"
sync "$(dirname "$target")" # the new name, too
