#!/bin/sh
# Pull a disk as it was, and release by TRIM what is stored: in shell, with nbdinfo and nbdsh.
#
#   examples/pull-with-trim.sh URI TARGET
#
# URI is a fleecing export of a running server, which the guest goes on using meanwhile:
#
#   fleecenbd serve vm.raw --begin nightly -U /run/vm.sock
#   examples/pull-with-trim.sh 'nbd+unix:///vm@nightly?socket=/run/vm.sock' /backup/vm.raw
#
# The order is everything: read, write, make durable, and only then release. What was released
# cannot be read again. So a pull that fails leaves its TARGET.part, which may hold the only copy
# of the disk as it was then, and the next pull does not touch it.
#
# Needs nbdinfo and nbdsh (libnbd-bin, python3-libnbd), and nothing of fleecenbd.
set -eu

fail() { printf 'pull-with-trim: %s\n' "$*" >&2; exit 1; }

[ $# = 2 ] || { echo "usage: $0 URI TARGET" >&2; exit 2; }
case $2 in /*) target=$2 ;; *) target=./$2 ;; esac # never taken for an option
if [ -e "$target" ] && [ ! -f "$target" ]; then fail "$2 is there, and not a file"; fi
# nbdsh asks for the first python3 there is; a checkout's has libnbd's module.
PATH=$(dirname "$0")/../.venv/bin:$PATH
export PATH uri="$1" part="$target.part"

map=$(mktemp)
trap 'rm -f "$map"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Only fleecing exports have this meta context. On the guest's own export a TRIM would not release
# old data, but discard the disk's.
nbdinfo --map=x-fleecenbd:access "$uri" >/dev/null ||
    fail "$uri is not a fleecing export that can be read"

# One line for each extent: its offset, its length, and a number in which 2 stands for zeroes.
# The disk as it was does not change any more, so neither does this map.
nbdinfo --map "$uri" >"$map" || fail "$uri has no map"

(umask 077 && set -C && : >"$part") || fail "$2.part is there: from another pull?"
sync "$(dirname "$part")"

nbdsh -c '
import os, sys

STEP = 16 << 20  # bytes that are made durable and released at a time; a READ takes 32 MiB at most
h.connect_uri(os.environ["uri"])
size, stored, steps = h.get_size(), 0, []

def release(end):
    part.flush()
    os.fdatasync(part.fileno())       # durable first,
    for offset, length in steps:
        h.trim(length, offset)        # released then
    steps.clear()
    done = f"{100 * end // size:3} %  {stored >> 20} MiB of data stored"
    print(f"\r{done}", end="", file=sys.stderr, flush=True)

try:
    with open(os.environ["part"], "r+b") as part:
        part.truncate(size)           # all of it a hole; only data is written
        for line in sys.stdin:
            start, count, kind = map(int, line.split()[:3])
            for offset in range(start, start + count, STEP):
                length = min(STEP, start + count - offset)
                if not kind & 2:
                    part.seek(offset)
                    part.write(h.pread(length, offset))
                    stored += length
                steps.append((offset, length))
                if offset + length - steps[0][0] >= STEP:
                    release(offset + length)
        release(size)
    print(file=sys.stderr)
    h.shutdown()
except OSError as error:
    sys.exit(f"\n{error}")            # nbdsh would show it with a traceback
' <"$map" ||
    fail "no backup of $uri; $2.part holds what was stored (the server's log may say more)"

mv -f "$part" "$target"
sync "$(dirname "$target")" # the new name, too
