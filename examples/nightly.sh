#!/bin/sh
# Back up a running VM every night: all of it at first, then what has changed. With stock tools:
# `fleecenbd backup --all FOLDER --incremental chain --or-full` makes the same nights by itself, and
# each goes on with those of the other.
#
#   examples/nightly.sh [--full] SOCKET FOLDER [OPTION OF fleecenbd session begin...]
#
# SOCKET is the Unix socket of the VM's server, which its guest goes on using meanwhile, and FOLDER
# the place for this VM's backups:
#
#   fleecenbd serve vda=/dev/vg/vm1 vdb=data.raw -U /run/vm.sock
#   examples/nightly.sh /run/vm.sock /backup/vm
#
# All disks are backed up as they were at one moment, into a folder that gets its name when it is
# whole and on the disk: FOLDER/2026-11-22T20-15-03Z-6f1c3a52. In there each disk is either
# DISK.raw, a full backup, or DISK.qcow2, the changes since an earlier one, on which it builds; and
# session.json is what the server said of the session. To restore a disk as it was that night:
#
#   qemu-img convert -O raw /backup/vm/2026-11-22T20-15-03Z-6f1c3a52/vda.qcow2 restored.raw
#
# The server decides, disk by disk, whether there is a chain to go on with. --full begins a new
# one. An increment builds on the backup of the very session that the changes are counted from; if
# that is not in FOLDER any more, a full backup is made. Whatever fails, the session is finished as
# failed, no change is forgotten, and the next night makes good for it.
#
# SESSION and BITMAP in the environment are other names for the session (nightly) and the chain
# (chain); FLEECENBD_CONTROL is the control socket, if it is not SOCKET.control. A chain has FILES_MAX
# files at most (100): QEMU cannot open one whose names, one after the other, are a path too long.
#
# Needs nbdcopy (libnbd-bin), qemu-img and qemu-io (qemu-utils; in a checkout `make tools` installs
# them), and Python for what is JSON.
set -eu

fail() { printf 'nightly: %s\n' "$*" >&2; exit 1; }

mode=use-or-new
if [ "${1:-}" = --full ]; then mode=new && shift; fi
[ $# -ge 2 ] || { echo "usage: $0 [--full] SOCKET FOLDER [OPTION...]" >&2; exit 2; }
[ -S "$1" ] || fail "$1 is no socket: does the server run?"
[ -d "$2" ] || fail "$2 is no folder (mkdir makes one)"
socket=$(realpath "$1")
folder=$(realpath "$2")
shift 2
# An installed fleecenbd first, else that of the checkout, or the one beside this script.
PATH=$PATH:$(dirname "$0")/../.venv/bin:$(dirname "$0")
session=${SESSION:-nightly}
bitmap=${BITMAP:-chain}
files_max=${FILES_MAX:-100}
export FLEECENBD_CONTROL="${FLEECENBD_CONTROL:-$socket.control}"
# Whoever backs up into this folder, and this run of it: the server gives nobody a session of old.
ours="nightly.sh $(printf %s "$folder" | cksum)"
owner="$ours $(date +%s) $$"
umask 077 # a guest's disk is not for everybody

# One at a time. The lock goes with this process and all that it has started.
exec 9>"$folder/.lock"
flock -n 9 || fail "another backup into $folder is at work (wait for it)"
part=$folder/.part
is_begun=no

# Is there a session of this folder's that is not finished? By the lock it can only be this run's,
# or that of a run that was killed.
is_ours() {
    fleecenbd session show "$session" --json 2>/dev/null | python3 -c '
import json, sys

try:
    shown = json.load(sys.stdin)
except ValueError:  # there is none
    sys.exit(1)
sys.exit(shown["state"] == "finished" or not (shown["owner"] or "").startswith(sys.argv[1] + " "))
' "$ours"
}

end() {
    status=$?
    trap '' HUP INT TERM
    # Where the server cannot be asked now, the next run does it.
    if [ "$is_begun" = yes ] && is_ours; then
        fleecenbd session finish "$session" --failed || status=1
    fi
    rm -rf "$part"
    exit "$status"
}

try_begin() {
    begin_mode=$1
    shift
    fleecenbd session begin "$session" --bitmap "$bitmap" --bitmap-mode "$begin_mode" \
        --owner "$owner" --json "$@" >"$part/session.json"
}

# begin MODE [OPTION...]: what becomes of each disk is in the answer, and in $part/plan: lines of
# disk, mode, session that the changes are counted from, bytes for a bit, bytes that have changed.
begin() {
    is_begun=yes
    if ! try_begin "$@"; then
        is_ours || fail "no session, so no backup"
        echo "nightly: session $session was left by a run that was killed; it counts as failed" >&2
        fleecenbd session finish "$session" --failed
        try_begin "$@" || fail "no session, so no backup"
    fi
    python3 - "$part/session.json" >"$part/plan" <<'END'
import json, sys

for disk in json.load(open(sys.argv[1]))["disks"]:
    own = disk["bitmap"]
    since = (own["since"] or {}).get("session_id", "none")
    print(disk["disk"], own["mode"], since, own["granularity"], own["dirty"], disk["size"])
END
}

# The file with that session's backup of a disk, seen from another night's folder; or nothing.
backup_of() {
    for found in $(cd "$folder" && grep -lsF "\"id\": \"$1\"" ./*/session.json); do
        night=$(dirname "$found")
        for file in "$night/$2.raw" "$night/$2.qcow2"; do
            if [ -f "$folder/$file" ]; then echo "../${file#./}" && return; fi
        done
    done
}

# How many files a chain has.
files_of() {
    qemu-img info --backing-chain "$1" | grep -c "^image:" || true
}

full() {
    if [ -t 2 ]; then progress=--progress; else progress=; fi
    # --flush: nbdcopy syncs the file before it ends.
    # shellcheck disable=SC2086  # nothing, or an option
    nbdcopy --flush $progress "$uri" "$part/$disk.raw" >&2 || fail "no backup of $disk"
}

# A qcow2 overlay on the export. What qemu-io reads with -C is copied into it: the changes. In the
# end it is told to build on the earlier backup. A cluster of its own must be no larger than a bit
# of the bitmap, or QEMU would read around a change, which the server refuses.
increment() {
    overlay=$part/$disk.qcow2
    cluster=$((granularity < 65536 ? granularity : 65536))
    qemu-img create -q -f qcow2 -o "cluster_size=$cluster" -F raw -b "$uri" "$overlay" ||
        fail "no overlay on $disk@$session"
    path=$(printf %s "$socket" | sed 's/,/,,/g')
    dirty=driver=nbd,server.type=unix,server.path=$path,export=$disk@$session
    qemu-img map --output=json --image-opts \
        "$dirty,x-dirty-bitmap=qemu:dirty-bitmap:$bitmap" >"$part/map.json" ||
        fail "no map of what has changed on $disk"
    # qemu-img calls "not data" what is dirty. At most 1 MiB at a time, which is held in memory.
    python3 - "$part/map.json" "$size" "$granularity" "$changed" >"$part/reads" <<'END' || exit 1
import json, sys

size, granularity, changed = map(int, sys.argv[2:])
bits = 0
for extent in json.load(open(sys.argv[1])):
    if extent["data"]:
        continue
    offset, end = extent["start"], min(extent["start"] + extent["length"], size)
    bits += -(-(end - offset) // granularity)
    for at in range(offset, end, 1 << 20):
        print("read", at, min(1 << 20, end - at))
if min(bits * granularity, size) != changed:
    sys.exit("nightly: the map of changes is not the one that the server spoke of")
END
    qemu-io -C -f qcow2 "$overlay" <"$part/reads" >"$part/told" ||
        fail "no backup of $disk: $(grep failed "$part/told" | head -n 1)"
    qemu-img rebase -u -F "${before##*.}" -b "$before" "$overlay" ||
        fail "$overlay cannot be told what it builds on"
    rm "$part/map.json" "$part/reads" "$part/told"
}

trap end EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

rm -rf "$part"
mkdir "$part"

begin "$mode" "$@"
while read -r disk how since _; do
    [ "$how" != new ] || continue
    before=$(backup_of "$since" "$disk")
    files=0
    [ -z "$before" ] || files=$(files_of "$folder/${before#../}")
    if [ -z "$before" ]; then
        why="whose backup is not in $folder"
    elif [ "$files" -eq 0 ]; then
        why="whose backup cannot be opened"
    elif [ "$files" -ge "$files_max" ]; then
        why="whose backup ends a chain of $files files"
    else
        continue
    fi
    echo "nightly: $disk has changes since session $since, $why: a full backup" >&2
    fleecenbd session finish "$session" --failed
    begin new "$@"
    break
done <"$part/plan"

quoted=$(python3 -c 'import sys, urllib.parse; print(urllib.parse.quote(sys.argv[1]))' "$socket")
while read -r disk how since granularity changed size <&3; do
    uri="nbd+unix:///$disk@$session?socket=$quoted"
    if [ "$how" = new ]; then
        full
    else
        before=$(backup_of "$since" "$disk")
        increment
    fi
done 3<"$part/plan"

# Safe first, the name then; and only what has its name is told to be safe.
rm "$part/plan"
sync "$part"/* "$part"
night=$(python3 - "$part/session.json" <<'END'
import json, sys, time

begun = json.load(open(sys.argv[1]))
print(time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime(begun["armed_at"])), begun["id"][:8], sep="-")
END
)
mv -T "$part" "$folder/$night"
sync "$folder"
printf '%s\n' "$folder/$night"/*.raw "$folder/$night"/*.qcow2 | grep -v '/\*\.'
fleecenbd session finish "$session" ||
    fail "$folder/$night is whole, but the session is not finished: the next night builds on the" \
        "backup before it"
is_begun=no
