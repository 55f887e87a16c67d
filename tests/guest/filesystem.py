"""Disk images with ext4, made and looked at from outside, by e2fsprogs. No mount, no root."""

import hashlib
import tempfile
from pathlib import Path

from tests.serving import run, try_run

FSCK_CORRECTED = 1  # fsck(8): errors were corrected; replaying the journal is among them


def make_filesystem(path: Path, size: int) -> Path:
    """A sparse image with an empty ext4 on it, its blocks of 4 KiB as on any larger disk."""
    with path.open("wb") as image:
        image.truncate(size)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", path)
    return path


def replay_journal(image: Path) -> None:
    """Do what a mount does after a power cut."""
    result = try_run("fsck.ext4", "-p", image)
    assert result.returncode in (0, FSCK_CORRECTED), result.stdout + result.stderr


def faults(image: Path, expected: dict[str, str], *, others: bool = False) -> list[str]:
    """What is wrong with a file system: what fsck finds, and each file that is not as expected.

    `expected` maps paths to MD5 sums of contents. `others`: more files than those may be there.
    """
    check = try_run("fsck.ext4", "-f", "-n", image)
    found = [f"fsck finds faults:\n{check.stdout}"] if check.returncode != 0 else []
    files = sums(image)
    for path in sorted(expected.keys() - files.keys()):
        found.append(f"{path} is missing")
    for path in sorted(expected.keys() & files.keys()):
        if files[path] != expected[path]:
            found.append(f"{path} has another content")
    if not others:
        found += [f"{path} should not be there" for path in sorted(files.keys() - expected.keys())]
    return found


def sums(image: Path) -> dict[str, str]:
    """Path to MD5 sum of the content, of every file in an image."""
    with tempfile.TemporaryDirectory(prefix="fleecenbd-files-") as name:
        folder = Path(name)
        # It says what it cannot read, and succeeds: what is missing then is missed by whoever asks.
        run("debugfs", "-R", f"rdump / {folder}", image)
        return {
            f"/{path.relative_to(folder)}": hashlib.md5(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file()
        }
