#!/bin/sh
# Pull a disk as it was, and release by TRIM what is stored: in shell, with nbdsh.
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
# Needs nbdsh (python3-libnbd), and nothing of fleecenbd.
set -eu

fail() { printf 'pull-with-trim: %s\n' "$*" >&2; exit 1; }

[ $# = 2 ] || { echo "usage: $0 URI TARGET" >&2; exit 2; }
case $2 in /*) target=$2 ;; *) target=./$2 ;; esac # never taken for an option
if [ -e "$target" ] && [ ! -f "$target" ]; then fail "$2 is there, and not a file"; fi
# nbdsh asks for the first python3 there is; a checkout's has libnbd's module.
PATH=$(dirname "$0")/../.venv/bin:$PATH
export PATH target uri="$1"
umask 077 # a guest's disk is not for everybody

# One connection for all of it: it ends with its server. A server that was started anew has another
# session of that name, of another moment, and its data would not fit a map of the first one's.
exec nbdsh -c '
import os, sys
import nbd

STEP = 16 << 20  # bytes that are made durable and released at a time; a READ takes 32 MiB at most
ACCESS = "x-fleecenbd:access"  # a meta context that fleecing exports have, and guests have not
uri, target = os.environ["uri"], os.environ["target"]

def data_extents(offset, length):
    """(offset, length) of what is not known to be zeroes. A reply may cover only a part."""
    found, end = [], offset + length

    def collect(context, at, entries, _error):
        nonlocal offset
        if context == nbd.CONTEXT_BASE_ALLOCATION:
            for count, flags in zip(entries[::2], entries[1::2]):
                if not flags & nbd.STATE_ZERO and at < end:
                    found.append((at, min(count, end - at)))
                at += count
            offset = at
        return 0

    while offset < end:
        h.block_status(end - offset, offset, collect)
    return found

def sync_folder():
    folder = os.open(os.path.dirname(target), os.O_RDONLY)
    os.fsync(folder)                  # a new name is durable, too
    os.close(folder)

try:
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.add_meta_context(ACCESS)
    h.connect_uri(uri)
    if not h.can_meta_context(ACCESS):
        # On the own export of the guest a TRIM would discard data of the disk.
        sys.exit(
            f"pull-with-trim: {uri} is not a fleecing export that can be read "
            "(behind nbdkit none can be told)"
        )
    part = open(f"{target}.part", "xb")
except FileExistsError:
    sys.exit(f"pull-with-trim: {target}.part is there: from another pull?")
except (nbd.Error, OSError) as error:
    sys.exit(f"pull-with-trim: no backup of {uri}: {error}")

try:
    size, stored = h.get_size(), 0
    with part:
        part.truncate(size)           # all of it a hole; only data is written
        sync_folder()
        for step in range(0, size, STEP):
            length = min(STEP, size - step)
            for offset, count in data_extents(step, length):
                part.seek(offset)
                part.write(h.pread(count, offset))
                stored += count
            part.flush()
            os.fdatasync(part.fileno())   # durable first,
            h.trim(length, step)          # released then
            done = f"{100 * (step + length) // size:3} %  {stored >> 20} MiB of data stored"
            print(f"\r{done}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    os.replace(part.name, target)     # TARGET gets its name when it is whole
    sync_folder()
    h.shutdown()
except (nbd.Error, OSError) as error:
    sys.exit(f"\npull-with-trim: no backup of {uri}: {error}; {target}.part holds what was stored "
             "(the log of the server may say more)")
'
