#!/usr/bin/python3
"""Back up all disks of a session, as they were at one moment: each to a raw file, at a time.

    examples/backup-session.py SOCKET SESSION FOLDER

SOCKET is the Unix socket of a running server, which the guest goes on using meanwhile:

    fleecenbd serve vda=system.raw vdb=data.raw --begin nightly -U /run/vm.sock
    examples/backup-session.py /run/vm.sock nightly /backup/vm-2026-11-22

FOLDER is made: vda.raw, vdb.raw. It has that name when all of it is whole and on the disk;
otherwise there is none, since disks of different moments are no backup of a machine.

Needs nbdcopy (libnbd-bin) and libnbd's Python module (python3-libnbd).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from urllib.parse import quote

import nbd


class Failed(Exception):
    """What the user is told."""


def exports_of(socket: str, session: str) -> dict[str, str]:
    """The description of each fleecing export of a session, by the disk's name.

    Listing opens no export: it is no bother to a guest.
    """
    found = {}

    def collect(export: str, description: str) -> None:
        disk, _, of = export.partition("@")
        if of == session:
            found[disk] = description

    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_unix(socket)
    client.opt_list(collect)
    client.opt_abort()
    return found


def pull(socket: str, session: str, disks: list[str], folder: str) -> None:
    """Pull all disks at once; the first to fail ends the others."""
    pulls = {}
    try:
        for disk in disks:
            uri = f"nbd+unix:///{disk}@{session}?socket={quote(socket)}"
            target = os.path.join(folder, f"{disk}.raw")
            # pull-with-trim.py URI TARGET would do as well, and free the temp image as it goes.
            pulls[disk] = subprocess.Popen(["nbdcopy", "--flush", uri, target])
        while pulls:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # whichever ends next
            for disk in [disk for disk, process in pulls.items() if process.poll() is not None]:
                if pulls.pop(disk).returncode != 0:
                    raise Failed(f"no backup of {disk}@{session} (the server's log may say more)")
    finally:
        for process in pulls.values():
            process.terminate()
            process.wait()


def backup(socket: str, session: str, target: str) -> None:
    """All or nothing."""
    target = os.path.abspath(target)
    if os.path.lexists(target):
        raise Failed(f"{target} is there already: name a new folder for each backup")
    before = exports_of(socket, session)
    if not before:
        raise Failed(f"there is no session {session} at {socket}")
    parent, name = os.path.split(target)
    part = tempfile.mkdtemp(prefix=f"{name}.", dir=parent)
    try:
        pull(socket, session, list(before), part)
        # A description has the session's id. A server that was started anew in between has another
        # session of that name, of another moment.
        if exports_of(socket, session) != before:
            raise Failed(f"session {session} has ended meanwhile")
        sync_folder(part)
        os.rename(part, target)
    except BaseException:
        shutil.rmtree(part)
        raise
    sync_folder(parent)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        print(f"usage: {sys.argv[0]} SOCKET SESSION FOLDER", file=sys.stderr)
        sys.exit(2)
    try:
        backup(*sys.argv[1:])
    except (Failed, nbd.Error, OSError) as error:
        sys.exit(f"backup-session: {error}")
