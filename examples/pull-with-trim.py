#!/usr/bin/python3
"""Pull a disk as it was, and release by TRIM what is stored, so that the server need not keep it.

    examples/pull-with-trim.py URI TARGET

URI is a fleecing export of a running server, which the guest goes on using meanwhile:

    fleecenbd serve vm.raw --begin nightly -U /run/vm.sock
    examples/pull-with-trim.py 'nbd+unix:///vm@nightly?socket=/run/vm.sock' /backup/vm.raw

The order is everything: read, write, make durable, and only then release. What was released
cannot be read again. So a pull that fails leaves its TARGET.part, which may hold the only copy of
the disk as it was then, and the next pull does not touch it.

Needs libnbd's Python module (python3-libnbd) and nothing of fleecenbd.
"""

import os
import sys

import nbd

STEP = 16 << 20  # bytes that are made durable and released at a time; a READ takes 32 MiB at most
ACCESS = "x-fleecenbd:access"  # a meta context that fleecing exports have, and guests' have not


def data_extents(client: nbd.NBD, offset: int, length: int) -> list[tuple[int, int]]:
    """(offset, length) of what is not known to be zeroes. A reply may cover only a part."""
    found = []
    end = offset + length

    def collect(context: str, at: int, entries: list[int], _error: object) -> int:
        nonlocal offset
        if context == nbd.CONTEXT_BASE_ALLOCATION:
            for count, flags in zip(entries[::2], entries[1::2], strict=True):
                if not flags & nbd.STATE_ZERO and at < end:
                    found.append((at, min(count, end - at)))
                at += count
            offset = at
        return 0

    while offset < end:
        client.block_status(end - offset, offset, collect)
    return found


def sync_folder(path: str) -> None:
    """Make the name of a file durable."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def pull(uri: str, target: str) -> None:
    """Copy the export to a new file, releasing it on the way."""
    if os.path.lexists(target) and not os.path.isfile(target):
        sys.exit(f"pull-with-trim: {target} is there, and not a file")
    client = nbd.NBD()
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.add_meta_context(ACCESS)
    client.set_uri_allow_local_file(True)  # nbds://…?tls-psk-file=
    client.connect_uri(uri)
    if not client.can_meta_context(ACCESS):
        # On the guest's own export a TRIM would not release old data, but discard the disk's.
        sys.exit(
            f"pull-with-trim: {uri} is not a fleecing export that can be read "
            "(behind nbdkit none can be told)"
        )
    size, stored = client.get_size(), 0
    with open(f"{target}.part", "xb") as part:
        part.truncate(size)  # all of it a hole; only data is written
        sync_folder(target)
        for step in range(0, size, STEP):
            length = min(STEP, size - step)
            for offset, count in data_extents(client, step, length):
                part.seek(offset)
                part.write(client.pread(count, offset))  # all of it, or an error: a file's write()
                stored += count
            part.flush()
            os.fdatasync(part.fileno())  # durable first,
            client.trim(length, step)  # released then
            done = f"{100 * (step + length) // size:3} %  {stored >> 20} MiB of data stored"
            print(f"\r{done}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    os.replace(part.name, target)  # TARGET gets its name when it is whole
    sync_folder(target)
    client.shutdown()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(f"usage: {sys.argv[0]} URI TARGET", file=sys.stderr)
        sys.exit(2)
    os.umask(0o077)  # a guest's disk is not for everybody
    try:
        pull(*sys.argv[1:])
    except FileExistsError as error:
        sys.exit(
            f"pull-with-trim: {error.filename} is there, from another pull: keep it or remove it"
        )
    except (nbd.Error, OSError) as error:
        more = " (the server's log may say more)" if isinstance(error, nbd.Error) else ""
        kept = f"{sys.argv[2]}.part"
        if os.path.exists(kept):
            more += f"; {kept} may hold the only copy of what was released"
        sys.exit(f"\npull-with-trim: {error}{more}")
