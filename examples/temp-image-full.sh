#!/bin/sh
# What happens when the temp image fills up: four times the same, over a small disk of its own.
#
#   examples/temp-image-full.sh
#
# The temp image holds what the guest has overwritten since the session began and the backup has
# not released. Here it may hold 1 MiB (--temp-limit), and the guest overwrites 2 MiB. A full file
# system under --state-dir does the same. Who suffers is chosen by --on-cbw-error:
#
#   break-snapshot     (the default) the guest goes on, and the session is lost: its readers get
#                      EIO, never wrong data. A new session, a new backup.
#   break-guest-write  the session stays good, and the guest's write fails with EIO until there is
#                      space again. Most guests do not take that well.
#   throttle           as break-snapshot, but the fuller the temp image is, the longer the guest's
#                      writes wait (100 ms at most), so that the backup can keep up.
#
# A backup that TRIMs what it has stored frees space as it goes: then nothing fills up at all.
#
# Needs nbdsh (python3-libnbd). Exit status 1 if anything is not as told here.
set -eu

[ $# = 0 ] || { echo "usage: $0" >&2; exit 2; }
PATH=$(dirname "$0")/../.venv/bin:$PATH # a checkout's fleecenbd first, else an installed one

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# serve POLICY SCRIPT: a server with a private socket, and nbdsh as guest and as backup in one. The
# server ends with nbdsh, and has its exit status.
serve() {
    head -c 4194304 /dev/urandom >"$work/vm.raw" # random, since zeroes take no space when kept
    cp "$work/vm.raw" "$work/before.raw"
    export before="$work/before.raw" script="$prelude$2"
    # shellcheck disable=SC2016  # for the shell of --run to expand
    fleecenbd serve "$work/vm.raw" --begin nightly --state-dir "$work/state" \
        --temp-limit 1M --temp-reserve none --on-cbw-error "$1" --run 'nbdsh -c "$script"'
}

# shellcheck disable=SC2016  # Python's quotes, not the shell's
prelude='
import os, nbd

guest, backup = nbd.NBD(), nbd.NBD()
for client, export in (guest, "vm"), (backup, "vm@nightly"):
    client.set_export_name(export)
    client.connect_unix(os.environ["unixsocket"])

STEP = 64 << 10
before = open(os.environ["before"], "rb").read()

def attempt(call, *arguments):
    """What the call returns, and None; or None, and the name of the error."""
    try:
        return call(*arguments), None
    except nbd.Error as error:
        return None, error.errno

def overwrite(count):
    """The guest writes the first `count` bytes of its disk; None, or the name of an error."""
    for offset in range(0, count, STEP):
        _, error = attempt(guest.pwrite, b"new " * (STEP // 4), offset)
        if error:
            print(f"  guest: write at {offset >> 10} KiB fails: {error}")
            return error
    print(f"  guest: wrote {count >> 10} KiB")

def read(length, offset):
    data, error = attempt(backup.pread, length, offset)
    expect(error or data == before[offset : offset + length])
    print(f"  backup: read at {offset >> 10} KiB:", error or "as it was when the session began")
    return error

def expect(is_so):
    if not is_so:
        raise SystemExit("not as it should be")
'

echo "1. break-snapshot: the guest comes first (the server says why the session broke)"
serve break-snapshot '
expect(overwrite(2 << 20) is None)
expect(read(STEP, 0) == "EIO")
expect(read(STEP, 3 << 20) == "EIO")
'

echo "2. break-guest-write: the backup comes first"
serve break-guest-write '
expect(overwrite(2 << 20) == "EIO")
expect(read(STEP, 0) is None)
print("  backup: TRIM of the first 1024 KiB")
backup.trim(1 << 20, 0)
expect(overwrite(2 << 20) is None)
expect(read(STEP, 1 << 20) is None)
'

echo "3. a backup that TRIMs as it goes: nothing fills up"
serve break-snapshot '
for offset in range(0, 2 << 20, STEP):
    backup.pread(STEP, offset)  # store it, make it durable, and then
    backup.trim(STEP, offset)
print("  backup: has released the first 2048 KiB: nobody needs their old data any more")
expect(overwrite(2 << 20) is None)
expect(read(STEP, 3 << 20) is None)
'

echo "4. throttle: the last fifth takes its time, and a backup that has caught up ends that"
serve throttle '
import time

def timed(count):
    began = time.monotonic()
    expect(overwrite(count) is None)
    took = time.monotonic() - began
    print(f"    in {took * 1000:.0f} ms")
    return took

expect(timed(768 << 10) < timed(1 << 20))  # the first three quarters are written once only
expect(read(1 << 20, 0) is None)
print("  backup: TRIM of the first 1024 KiB")
backup.trim(1 << 20, 0)
expect(timed(1 << 20) < 0.1)
expect(read(STEP, 3 << 20) is None)
'
