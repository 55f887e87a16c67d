"""The comparison notices: wrong bytes, wrong zeroes, wrong errors, and what nobody wrote down."""

import pytest

from tests.differential.differences import Unexplained, explain
from tests.differential.peer import Answer
from tests.differential.script import CLUSTER, Step, draw, parse
from tests.differential.truth import Truth
from tests.disks import KIB, MIB

SIZE = 3 * CLUSTER + 512
CONTENT = bytes(CLUSTER) + b"a" * CLUSTER + b"b" * CLUSTER + b"c" * 512
READ = Step(0, "backup", "read", CLUSTER, CLUSTER)


def _step(text: str) -> Step:
    return parse([text], SIZE)[0]


def _explained(step: Step, ours: Answer, theirs: Answer, truth: Truth) -> set[str]:
    found = explain(step, ours, theirs, truth)
    return {"unexplained" if isinstance(name, Unexplained) else name for name in found}


def test_a_wrong_byte_is_noticed_with_its_offset() -> None:
    truth = Truth(CONTENT)
    data = b"a" * 10 + b"x" + b"a" * (CLUSTER - 11)
    assert truth.wrong(READ, Answer(data=b"a" * CLUSTER)) is None
    assert str(CLUSTER + 10) in (truth.wrong(READ, Answer(data=data)) or "")


def test_what_the_guest_wrote_is_wrong_for_the_backup_and_right_for_the_guest() -> None:
    truth = Truth(CONTENT)
    write = _step("guest write 64k 64k")
    truth.apply(write)
    assert truth.wrong(READ, Answer(data=write.payload())) is not None
    assert truth.wrong(_step("guest read 64k 64k"), Answer(data=write.payload())) is None


def test_a_zero_that_is_none_is_noticed_and_data_that_is_zero_is_not() -> None:
    truth = Truth(CONTENT)
    status = _step("backup status 0 128k")
    assert truth.wrong(status, Answer(extents=((CLUSTER, 3), (CLUSTER, 0)))) is None
    assert truth.wrong(status, Answer(extents=((2 * CLUSTER, 0),))) is None
    assert truth.wrong(status, Answer(extents=((CLUSTER + 1, 3), (CLUSTER - 1, 0)))) is not None


def test_trimmed_bytes_may_be_old_or_zero_and_nothing_else_until_they_are_written() -> None:
    truth = Truth(CONTENT)
    read = _step("guest read 64k 4")
    truth.apply(_step("guest trim 64k 64k"))
    assert truth.wrong(read, Answer(data=b"a\0a\0")) is None
    assert truth.wrong(read, Answer(data=b"a\0b\0")) is not None
    truth.apply(_step("guest zero 64k 64k"))
    assert truth.wrong(read, Answer(data=b"\0\0\0\0")) is None
    assert truth.wrong(read, Answer(data=b"a\0\0\0")) is not None


def test_a_released_cluster_that_is_still_read_is_not_explained() -> None:
    truth = Truth(CONTENT)
    truth.apply(_step("backup trim 64k 64k"))
    data = Answer(data=b"a" * CLUSTER)
    assert _explained(READ, data, Answer("EINVAL"), truth) == {"unexplained"}
    assert _explained(READ, Answer("EINVAL"), data, truth) == {"unexplained"}
    assert _explained(READ, Answer("EIO"), Answer("EINVAL"), truth) == {"unexplained"}


def test_a_read_that_fails_for_nothing_is_not_explained() -> None:
    data = Answer(data=b"a" * CLUSTER)
    assert _explained(READ, Answer("EINVAL"), data, Truth(CONTENT)) == {"unexplained"}
    assert _explained(READ, data, Answer("EINVAL"), Truth(CONTENT)) == {"unexplained"}


def test_parts_that_add_up_and_the_last_cluster_are_told_apart() -> None:
    truth = Truth(CONTENT)
    truth.apply(_step("backup trim 64k 30k"))
    data = Answer(data=b"a" * CLUSTER)
    assert _explained(READ, Answer("EINVAL"), data, truth) == {"unexplained"}
    truth.apply(_step("backup trim 94k 34k"))
    assert _explained(READ, Answer("EINVAL"), data, truth) == {"parts-of-clusters"}
    truth.apply(_step("backup trim end-512 512"))
    last = _step("backup read end-512 512")
    assert _explained(last, Answer("EINVAL"), Answer(data=b"c" * 512), truth) == {"last-cluster"}


@pytest.mark.parametrize(
    ("text", "ours", "theirs", "name"),
    [
        ("guest read 0 0", "EINVAL", None, "length-zero"),
        ("guest write end 1", "ENOSPC", "EINVAL", "write-past-end"),
        ("guest zero 0 1 fast", "ENOTSUP", None, "fast-zero-copies"),
        ("backup write 0 1", "EPERM", "ENOTSUP", "write-to-backup"),
        ("backup write end 0", "EPERM", "ENOTSUP", "write-to-backup"),
        ("backup write end-1 2", "EPERM", "EINVAL", "write-to-backup"),
        ("backup write end-1 1 fua", "EINVAL", "ENOTSUP", "fua-on-backup"),
        ("backup zero 0 1", "EINVAL", "ENOTSUP", "zero-on-backup"),
        ("backup cache 0 1", "EINVAL", None, "cache-on-backup"),
        ("backup trim 0 64k fua", "EINVAL", None, "fua-on-backup"),
    ],
)
def test_an_error_is_explained_by_its_request_alone(
    text: str, ours: str, theirs: str | None, name: str
) -> None:
    truth = Truth(CONTENT)
    assert _explained(_step(text), Answer(ours), Answer(theirs), truth) == {name}
    assert _explained(_step(text), Answer("EIO"), Answer(theirs), truth) == {"unexplained"}
    other = _step("guest trim 0 64k")
    assert _explained(other, Answer(ours), Answer(theirs), truth) == {"unexplained"}


def test_a_write_to_a_backup_is_einval_in_qemu_past_the_end_alone() -> None:
    truth = Truth(CONTENT)
    ours, theirs = Answer("EPERM"), Answer("EINVAL")
    assert _explained(_step("backup write end-1 2"), ours, theirs, truth) == {"write-to-backup"}
    assert _explained(_step("backup write end-1 1"), ours, theirs, truth) == {"unexplained"}


def test_a_fast_zero_that_has_nothing_to_copy_must_be_done() -> None:
    truth = Truth(CONTENT)
    zero = _step("guest zero 64k 64k fast")
    assert _explained(zero, Answer("ENOTSUP"), Answer(), truth) == {"fast-zero-copies"}
    for before in ("guest write 64k 1", "backup trim 64k 64k"):
        truth = Truth(CONTENT)
        truth.apply(_step(before))
        assert _explained(zero, Answer("ENOTSUP"), Answer(), truth) == {"unexplained"}


def test_a_status_that_says_hole_and_not_zero_is_not_explained() -> None:
    status = _step("backup status 0 64k")
    hole, data = Answer(extents=((CLUSTER, 1),)), Answer(extents=((CLUSTER, 0),))
    assert _explained(status, hole, data, Truth(CONTENT)) == {"unexplained"}
    zero = Answer(extents=((CLUSTER, 3),))
    assert _explained(status, zero, data, Truth(CONTENT)) == {"zeroes-found"}
    assert _explained(status, data, zero, Truth(CONTENT)) == {"zeroes-missed"}


def test_a_status_that_fails_for_nothing_is_not_explained() -> None:
    status = _step("backup status 64k 64k")
    truth = Truth(CONTENT)
    data = Answer(extents=((CLUSTER, 0),))
    assert _explained(status, data, Answer("EINVAL", extents=()), truth) == {"unexplained"}
    truth.apply(_step("backup trim 64k 64k"))
    assert _explained(status, data, Answer("EINVAL", extents=()), truth) == {"status-of-released"}


def test_a_script_is_read_with_its_units_and_its_comments() -> None:
    lines = ["# nothing", "", "guest write 64k+1 2M-3 fua  # a comment", "backup flush"]
    write, flush = parse(lines, SIZE)
    assert write == Step(0, "guest", "write", 64 * KIB + 1, 2 * MIB - 3, ("fua",))
    assert flush == Step(1, "backup", "flush")
    assert parse([str(write)], SIZE) == [write]


@pytest.mark.parametrize(
    "line",
    [
        "guest",
        "guest eat 0 1",
        "host read 0 1",
        "guest read 0 1x",
        "guest read 0 1 fast!",
        "guest read 0",
    ],
)
def test_a_line_that_means_nothing_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"line 1 is no step|1x is no number"):
        parse([line], SIZE)


def test_one_seed_is_one_script() -> None:
    assert draw(7, 100, SIZE) == draw(7, 100, SIZE)
    assert draw(7, 100, SIZE) != draw(8, 100, SIZE)
