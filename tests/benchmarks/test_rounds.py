"""The order of a round, and what a failure costs."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.peers import Server
from benchmarks.rounds import Media, measure, places
from benchmarks.suites import Step, Subject, Suite
from benchmarks.work import MIB, Place


@contextlib.contextmanager
def _nothing(place: Place) -> Iterator[Server]:
    yield Server(("guest",), (), (), 0.0)


def _fine(metric: str, figure: float) -> Step:
    return Step((metric,), lambda server, place: {metric: figure})


def _failing(metric: str) -> Step:
    def work(server: Server, place: Place) -> dict[str, float]:
        raise OSError("the socket is gone")

    return Step((metric,), work)


@pytest.fixture
def place(tmp_path: Path) -> Callable[[Suite], Place]:
    image = tmp_path / "vm.raw"
    image.write_bytes(b"x")
    return lambda suite: Place(tmp_path, image, 1, 1.0)


def test_every_second_round_turns_the_order(place: Callable[[Suite], Place]) -> None:
    suite = Suite("s", tuple(Subject(name, _nothing, (_fine("m", 1.0),)) for name in "abc"))
    told: list[str] = []
    for number in range(3):
        measure(number, [suite], place, told.append)
    order = "".join(words[-1] for words in told)
    assert order == "abc" + "cba" + "abc"


def test_after_a_step_that_failed_the_rest_is_an_error_and_what_was_measured_stays(
    place: Callable[[Suite], Place],
) -> None:
    steps = (_fine("first", 1.5), _failing("second"), _fine("third", 3.0))
    suite = Suite("s", (Subject("a", _nothing, steps), Subject("b", _nothing, steps[:1])))
    figures = measure(0, [suite], place, lambda words: None)
    wrong = "OSError: the socket is gone"
    assert figures["s"]["a"] == {"first": 1.5, "second": wrong, "third": wrong}
    assert figures["s"]["b"] == {"first": 1.5}


def test_a_server_that_does_not_start_is_an_error_of_all_its_rows(
    place: Callable[[Suite], Place],
) -> None:
    @contextlib.contextmanager
    def dead(place: Place) -> Iterator[Server]:
        raise RuntimeError("ended with status 1")
        yield

    suite = Suite("s", (Subject("a", dead, (_fine("m", 1.0),)),))
    assert measure(0, [suite], place, lambda words: None)["s"]["a"] == {
        "m": "RuntimeError: ended with status 1"
    }


def test_a_medium_without_room_is_told_before_anything_is_made(tmp_path: Path) -> None:
    media = Media(tmp_path, tmp_path, 1 << 60, 1.0)
    with (
        pytest.raises(RuntimeError, match="are needed: use a smaller --size"),
        places(media, [Suite("s", ())]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_images_are_made_on_the_media_that_suites_need_and_leave_nothing(tmp_path: Path) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    suites = [Suite("s", ()), Suite("on disk", (), on_disk=True)]
    with places(Media(memory, disk, 2 * MIB, 1.0), suites) as place_of:
        for suite, folder in zip(suites, (memory, disk), strict=True):
            image = place_of(suite).image
            assert image.is_relative_to(folder)
            assert image.stat().st_size == 2 * MIB
    assert [*memory.iterdir(), *disk.iterdir()] == []
