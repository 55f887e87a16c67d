"""What an earlier pull has left beside a target: what it is worth, and who may go on with it.

journal  PATH.part  PATH      without --resume                 with --resume
-        -          -         a new pull                       refused: there is nothing
-        yes        any       refused, or --force              refused: nothing is known of it
yes      any        any       refused, or --force              goes on, in the same session
complete -          yes       (a kill came just then)          done already

Without --force there is no journal beside a PATH.part that is somebody else's. So beside a journal
PATH.part is this pull's, and as long as nothing is durable it is made anew: a kill may have come
when it was half made.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import unquote, urlsplit

import msgspec

from fleecenbd.client import checksums
from fleecenbd.client.file_target import other_part
from fleecenbd.client.journal import COMPLETE, COMPLETING, Header, Journal
from fleecenbd.client.journal_file import DurableFile, sync_folder
from fleecenbd.client.options import (
    JOURNAL_SUFFIX,
    ONCE,
    QCOW2,
    Places,
    PullOptions,
    path_of,
)
from fleecenbd.storage.system_calls import write_all


def check(options: PullOptions, places: Places) -> None:
    """Before anything is opened. Raises OSError that says what to do."""
    is_part_only = options.bitmap is not None and options.backing is None and not options.resume
    if is_part_only and places.file is not None and os.path.lexists(places.file):
        raise OSError(
            errno.EEXIST,
            f"is there already, and what changed in {options.bitmap} is no whole disk to take its "
            "place: name a new file; fleecenbd backup --incremental puts changes onto a backup",
            options.target,
        )
    has_journal = os.path.exists(places.journal)
    has_part = places.part is not None and os.path.lexists(places.part)
    if options.resume:
        if has_journal:
            return
        if has_part:
            raise OSError(
                errno.ENOENT,
                f"nothing can be resumed: {places.part} is there, and {places.journal}, which "
                "would tell how much of it is durable, is not; begin anew with --force, in a new "
                "session if anything was released in this one",
                options.target,
            )
        raise OSError(
            errno.ENOENT,
            f"nothing can be resumed: there is no {places.journal}; pull without --resume",
            options.target,
        )
    if has_journal and not options.force and places.file is not None:
        raise OSError(
            errno.EEXIST,
            f"a pull to it has not ended ({places.journal}): go on with --resume, or begin anew "
            "with --force and in a new session; what it has released can be read nowhere else",
            options.target,
        )
    if has_part and not options.force:
        assert places.part is not None, "it is there"
        raise other_part(places.part, options.target)


def open_journal(path: str, target: str) -> DurableFile:
    """Open it, or make it, locked. Raises OSError."""
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        is_beside = path.removesuffix(JOURNAL_SUFFIX) == path_of(target)
        raise FileNotFoundError(
            errno.ENOENT,
            f"its folder {folder} does not exist; make it",
            target if is_beside else path,
        )
    return DurableFile.open(path)


def take_up(
    file: DurableFile,
    header: Header,
    options: PullOptions,
    places: Places,
    note: Callable[[str], None],
) -> Journal:
    """The journal to go on with, or a new one; not written yet. Raises OSError."""
    if options.resume:
        if not file.content:
            return Journal(header, file)  # killed before its first line: nothing is durable
        journal = Journal.read(file.content, file)
        _check_same(journal.header, header, options)
        # What it was begun with rules: the checksums of before are of its algorithm.
        journal.header = msgspec.structs.replace(
            header,
            algorithm=journal.header.algorithm,
            target=journal.header.target,
            force=header.force or journal.header.force,
            verify=header.verify or journal.header.verify,
            checksum=header.checksum or journal.header.checksum,
        )
        return journal
    if file.content:
        _check_given_up(file, header, options, note)
    return Journal(header, file)


def _check_same(old: Header, new: Header, options: PullOptions) -> None:
    """Raises OSError where what is there is not of the source, or not as asked for now."""
    target = options.target
    if old.session != new.session:
        raise OSError(
            errno.EINVAL,
            f"what is there is of session {old.session or 'none'} ({old.source}), and this is "
            f"session {new.session or 'none'}: another moment's image; resume from the first one, "
            "or begin anew with --force, and what the first one has released is lost",
            target,
        )
    before, now = _export(old.source), _export(new.source)
    # An empty name is that of the one export there is.
    if new.session is not None and before and now and before != now:
        raise OSError(
            errno.EINVAL,
            f"what is there is of {before}, and this is {now}: another disk of the same moment; "
            "resume it from the first one, or name another target",
            target,
        )
    _check_same_target(old, options)
    if new.session is None and not options.force:
        raise OSError(
            errno.EINVAL,
            f"{options.source} tells no session, so nobody knows whether it is still what was "
            "copied before; if you do, add --force",
            target,
        )
    if new.session is None and old.source != new.source:
        raise OSError(errno.EINVAL, f"what is there was copied from {old.source}", target)
    if old.size != new.size or old.block != new.block:
        raise OSError(
            errno.EINVAL,
            f"what is there is of a disk of {old.size} bytes, and this one has {new.size}",
            target,
        )
    if old.bitmap != new.bitmap:
        raise OSError(
            errno.EINVAL,
            f"what is there was begun {_with('--bitmap', old.bitmap)}; resume it "
            f"{_with('--bitmap', old.bitmap)}",
            target,
        )
    if new.algorithm is not None and old.algorithm is None:
        raise OSError(
            errno.EINVAL,
            "what is there was begun without --checksum and --verify, and what it has released "
            "cannot be read again; resume it without them",
            target,
        )
    if options.checksum is not None and old.algorithm != options.checksum:
        raise OSError(
            errno.EINVAL,
            f"what is there has {old.algorithm} checksums, and what it has released cannot be read "
            f"again; resume it with --checksum {old.algorithm}, or leave that out",
            target,
        )


def _export(uri: str) -> str:
    return unquote(urlsplit(uri).path.removeprefix("/")).removesuffix(ONCE)


def _check_same_target(old: Header, options: PullOptions) -> None:
    """What the journal calls durable is durable there, and in that format, and nowhere else."""
    target = options.target
    if old.target.startswith(QCOW2) is not target.startswith(QCOW2):
        raise OSError(
            errno.EINVAL, f"what is there was begun as {old.target}; resume it as that", target
        )
    # Beside a file, or in a name made from the target's, it can be no other one's.
    if options.journal is None or options.force or _name(old.target) == _name(target):
        return
    raise OSError(
        errno.EINVAL,
        f"{options.journal} tells what is durable in {old.target}; name that, or, if this is the "
        "same under another name, add --force",
        target,
    )


def _name(target: str) -> str:
    """What two ways to write a target have in common."""
    path = path_of(target)
    return target if path is None else os.path.basename(path)


def _with(option: str, value: str | None) -> str:
    return f"without {option}" if value is None else f"with {option} {value}"


def _check_given_up(
    file: DurableFile, header: Header, options: PullOptions, note: Callable[[str], None]
) -> None:
    """A pull that has not ended makes room for another: say what is lost with it."""
    try:
        old = Journal.read(file.content, file)
    except OSError as error:
        if options.force:
            return
        raise OSError(
            errno.EEXIST,
            f"{file.name} is there, and is no pull's journal that can be read; name another with "
            "--journal, or write over it with --force",
            options.target,
        ) from error
    if old.mark == COMPLETE:
        return
    if not options.force:  # a device: the journal is elsewhere
        raise OSError(
            errno.EEXIST,
            f"a pull to it has not ended ({file.name}): go on with --resume, or begin anew with "
            "--force; what it has released can be read nowhere else",
            options.target,
        )
    if old.durable.bits.any() and old.header.session != header.session:
        note(
            f"given up: {old.durable.count_bytes()} bytes of session {old.header.session}, which "
            "were pulled before; what of it was released can be read nowhere else"
        )


def is_done(journal: Journal, places: Places) -> bool:
    """Whether the last pull was killed when the target was complete already."""
    if places.part is None or places.file is None:
        return journal.mark == COMPLETE
    return (
        journal.mark in (COMPLETING, COMPLETE)
        and not os.path.lexists(places.part)
        and os.path.lexists(places.file)
    )


def has_part(options: PullOptions, journal: Journal, places: Places) -> bool:
    """Whether the target is to be opened as an earlier pull has left it."""
    if not options.resume:
        return False
    return places.part is None or bool(journal.durable.bits.any())


def remove_part(places: Places) -> None:
    """What a pull has left of which nothing is durable. Raises OSError."""
    if places.part is not None:
        with suppress(FileNotFoundError):
            os.unlink(places.part)


def remove_checksums(places: Places, *, but: str | None) -> None:
    """What is beside the target, and true of what had its name before. Raises OSError.

    ``but``: the algorithm whose checksum was written just now.
    """
    for algorithm in checksums.algorithms():
        path = places.checksum(algorithm)
        if algorithm == but or path is None:
            continue
        try:
            with open(path, "rb") as file:
                is_ours = file.read(len(checksums.FIRST_LINE)) == checksums.FIRST_LINE
        except FileNotFoundError:
            continue
        if is_ours:
            os.unlink(path)


def write_durably(path: str, content: bytes) -> None:
    """Write a small file, so that it has its old content or all of the new one."""
    new = f"{path}.new"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, 0, content, new)
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    finally:
        os.close(descriptor)
    os.rename(new, path)
    sync_folder(path)
