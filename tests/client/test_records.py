"""Records: what may be built on, and what no longer is what it was."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleecenbd.client import records
from fleecenbd.client.records import BackedUp, BitmapUse, Found, Record, RecordedChecksum

SIZE = 4096


@dataclass
class Chain:
    """Backups of sessions 1, 2, …: each beside its record, building on the one before."""

    folder: Path

    def add(
        self,
        name: str,
        session: str,
        *,
        since: str | None = None,
        onto: str | None = None,
        disk: str = "vda",
        bitmap: str = "bitmap-1",
    ) -> Found:
        """A backup of a session, ``onto`` a file of the chain."""
        path = self.folder / name
        path.write_bytes(session.encode())
        below = None if onto is None else records.of_file(self.folder / onto)
        entry = BackedUp(
            disk,
            SIZE,
            name,
            "raw" if onto is None else "qcow2",
            "full" if onto is None else "increment",
            BitmapUse("chain", bitmap, since),
            backing=onto,
            onto=None if below is None else below.record.id,
            checksum=RecordedChecksum("sha256", "00"),
        )
        record = Record(session, "backup", 1.5, [records.whole_file(path, entry)])
        records.write(records.record_path(path), record)
        found = records.of_file(path)
        assert found is not None
        assert found.record == record
        return found


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def _why(found: Found, since: str, *, disk: str = "vda", bitmap: str = "bitmap-1") -> str | None:
    return records.why_not_onto(found, disk, SIZE, bitmap, since)


def test_the_session_that_the_bits_are_counted_from_is_what_may_be_built_on(chain: Chain) -> None:
    full = chain.add("full.raw", "s1")
    assert _why(full, "s1") is None
    assert "is of session s1, and what has changed is counted from session s2" in str(
        _why(full, "s2")
    )
    assert "is a backup of vda, not of vdb" in str(_why(full, "s1", disk="vdb"))
    assert "is of a disk of 4096 bytes" in str(
        records.why_not_onto(full, "vda", 2 * SIZE, "bitmap-1", "s1")
    )


def test_a_backup_whose_session_gave_its_bits_back_may_be_built_on_too(chain: Chain) -> None:
    chain.add("full.raw", "s1")
    failed = chain.add("second.qcow2", "s2", since="s1", onto="full.raw")
    assert _why(failed, "s1") is None
    # Those of another bitmap, or counted from another moment, need not cover what changed since.
    assert _why(failed, "s1", bitmap="bitmap-2") is not None
    assert _why(failed, "s0") is not None
    assert _why(chain.add("other.raw", "s3"), "s1") is not None


def test_every_file_below_must_be_what_its_record_says(chain: Chain) -> None:
    chain.add("full.raw", "s1")
    chain.add("mon.qcow2", "s2", since="s1", onto="full.raw")
    last = chain.add("tue.qcow2", "s3", since="s2", onto="mon.qcow2")
    assert records.why_not_whole(last) is None
    full = chain.folder / "full.raw"
    before = full.stat()
    full.write_bytes(b"S1")
    assert f"{full} was written to since" in str(records.why_not_whole(last))
    os.utime(full, ns=(0, before.st_mtime_ns))
    assert records.why_not_whole(last) is None
    full.write_bytes(b"longer")
    assert "has 6 bytes, and had 2" in str(records.why_not_whole(last))
    # In place it has become another moment's.
    chain.add("full.raw", "s9", since="s3")
    assert f"{full} is of session s9 now" in str(records.why_not_whole(last))
    full.unlink()
    assert "is of session s9 now" in str(records.why_not_whole(last))
    records.record_path(full).unlink()
    assert "on which" in str(records.why_not_whole(last))
    (chain.folder / "mon.qcow2").unlink()
    assert "mon.qcow2 is gone" in str(records.why_not_whole(last))
    assert "is gone" in str(_why(last, "s3"))


def test_a_chain_that_goes_round_is_told(chain: Chain) -> None:
    chain.add("a.raw", "s1")
    chain.add("b.qcow2", "s2", onto="a.raw")
    again = chain.add("a.raw", "s1", onto="b.qcow2")
    assert "builds on itself" in str(records.why_not_whole(again))


@pytest.mark.parametrize(
    ("noted", "there", "same"),
    [
        (1_234_567_891, 1_234_567_891, True),
        (1_234_567_891, 1_234_567_892, False),
        (1_234_567_891, 1_000_000_000, True),  # whole seconds
        (1_234_567_891, 2_000_000_000, True),  # two seconds, rounded up
        (1_234_567_891, 4_000_000_000, False),
    ],
)
def test_times_are_compared_as_exactly_as_the_file_system_keeps_them(
    chain: Chain, noted: int, there: int, same: bool
) -> None:
    path = chain.folder / "full.raw"
    path.write_bytes(b"12")
    os.utime(path, ns=(0, there))
    entry = BackedUp("vda", SIZE, "full.raw", "raw", "full", length=2, mtime_ns=noted)
    assert (records.why_changed(path, entry) is None) is same


def test_what_builds_on_a_file_is_found(chain: Chain) -> None:
    full = chain.add("full.raw", "s1").path
    assert records.dependents(full, [chain.folder]) == []
    above = chain.add("mon.qcow2", "s2", onto="full.raw").path
    assert records.dependents(full, [chain.folder]) == [above]
    above.unlink()
    assert records.dependents(full, [chain.folder]) == []


def test_what_nightly_sh_has_left_is_understood(tmp_path: Path) -> None:
    since = {"session": "nightly", "session_id": "s0", "armed_at": 1.0}
    own = {"name": "chain", "id": "b", "mode": "use", "since": since}
    disks = [
        {"disk": "vda", "size": SIZE, "bitmap": own},
        {"disk": "vdb", "size": SIZE, "bitmap": {**own, "mode": "new", "since": None}},
        {"disk": "gone", "size": SIZE, "bitmap": None},
    ]
    answer = {"name": "nightly", "id": "s1", "armed_at": 2.0, "disks": disks}
    (tmp_path / "session.json").write_text(json.dumps(answer))
    (tmp_path / "vda.qcow2").touch()
    (tmp_path / "vdb.raw").touch()
    increment = records.of_file(tmp_path / "vda.qcow2")
    assert increment is not None
    assert (increment.record.id, increment.disk.kind) == ("s1", "increment")
    assert _why(increment, "s1") is None
    assert records.fits(increment, "b", "s0")
    full = records.of_file(tmp_path / "vdb.raw")
    assert full is not None
    assert full.disk.kind == "full"
    assert [found.disk.disk for found in records.in_folder(tmp_path)] == ["vda", "vdb"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": 3}', b'{"fleecenbd_backup": 2}'])
def test_what_is_no_record_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.raw.backup.json"
    path.write_bytes(content)
    assert records.read(path) is None
    assert records.of_file(tmp_path / "x.raw") is None
    assert list(records.in_folder(tmp_path)) == []
    assert list(records.in_folder(tmp_path / "none")) == []


def test_a_record_is_what_a_person_can_read_and_grep(chain: Chain) -> None:
    chain.add("full.raw", "s1")
    text = (chain.folder / "full.raw.backup.json").read_text()
    assert '\n  "id": "s1",\n' in text
    assert json.loads(text)["disks"][0]["file"] == "full.raw"
