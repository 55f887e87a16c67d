"""What the journal tells after anything: merged records, a spoilt last line, damage."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecenbd.client import journal as module
from fleecenbd.client.journal import COMPLETE, Header, Journal

HEADER = Header("nbd://x", "t", 10 << 20, session="id", algorithm="blake2b")


class Memory:
    """journal.JournalFile in memory."""

    name = "t.journal"

    def __init__(self, content: bytes = b"") -> None:
        self.content = content
        self.replaced = 0

    async def append(self, data: bytes) -> None:
        """At the end."""
        self.content += data

    async def replace(self, data: bytes) -> None:
        """Counted."""
        self.content = data
        self.replaced += 1

    async def remove(self) -> None:
        """Nothing."""

    close = remove


async def _written() -> Memory:
    file = Memory()
    journal = Journal(HEADER, file)
    await journal.begin()
    await journal.add([(0, 2)], [(4, 3)], {0: b"a" * 64, 1: b"b" * 64})
    await journal.add([(9, 1)], [], {9: b"c" * 64})
    return file


async def test_records_merge_into_the_state() -> None:
    file = await _written()
    read = Journal.read(file.content, file)
    assert read.header == HEADER
    assert str(read.durable) == "1100111001"
    assert read.digests == {0: b"a" * 64, 1: b"b" * 64, 9: b"c" * 64}
    assert read.mark is None


async def test_a_journal_taken_up_again_is_as_short_as_can_be_and_says_the_same() -> None:
    file = await _written()
    read = Journal.read(file.content, file)
    await read.set_mark(COMPLETE)
    await read.begin()
    assert len(file.content.splitlines()) == 3
    again = Journal.read(file.content, file)
    assert (str(again.durable), again.digests) == (str(read.durable), read.digests)
    assert again.mark == COMPLETE


async def test_it_stays_small_however_many_batches_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "COMPACT_LENGTH_MIN", 1000)
    file = Memory()
    journal = Journal(Header("nbd://x", "t", 10_000 << 20), file)
    await journal.begin()
    for block in range(10_000):
        await journal.add([(block, 1)], [], {})
        assert len(file.content) < 1100
    assert file.replaced > 10
    assert Journal.read(file.content, file).durable.bits.all()


async def test_a_last_line_that_was_cut_short_or_spoilt_is_ignored() -> None:
    file = await _written()
    last = file.content.splitlines(keepends=True)[-1]
    whole = file.content.removesuffix(last)
    for cut in range(len(last)):
        read = Journal.read(whole + last[:cut], file)
        assert str(read.durable) == "1100111000", cut
    for at in range(len(last) - 1):
        spoilt = last[:at] + bytes([last[at] ^ 1]) + last[at + 1 :]
        assert str(Journal.read(whole + spoilt, file).durable) == "1100111000", at


async def test_a_spoilt_line_before_others_is_damage() -> None:
    file = await _written()
    first, second, third = file.content.splitlines(keepends=True)
    with pytest.raises(OSError, match=r"t\.journal is damaged"):
        Journal.read(first + b"x" + second + third, file)


@pytest.mark.parametrize("content", [b"", b"12345678 {}", b"no journal\n"])
def test_a_file_without_a_first_line_tells_nothing(content: bytes) -> None:
    with pytest.raises(OSError, match="tells nothing"):
        Journal.read(content, Memory())


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([{"journal": 2}], "is no journal of this version"),
        ([{"journal": 1}], "makes no sense"),
        ([msgspec.to_builtins(HEADER), {"data": [[9, 2]]}], "blocks 9 to 11 of 10"),
        ([msgspec.to_builtins(HEADER), {"data": [[0, 2]], "digests": "AAAA"}], "do not fit"),
        ([msgspec.to_builtins(HEADER), {"data": [[0, 0]]}], "makes no sense"),
    ],
)
def test_what_no_pull_has_written_is_refused(records: list[object], text: str) -> None:
    content = b"".join(map(module._encode, records))
    with pytest.raises(OSError, match=text):
        Journal.read(content, Memory())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_journal_or_an_error(content: bytes) -> None:
    with pytest.raises(OSError, match=r"t\.journal"):
        Journal.read(content, Memory())
