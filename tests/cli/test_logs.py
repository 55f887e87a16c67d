"""Log lines: what they look like, and that nobody waits for whoever reads them."""

import asyncio
import json
import logging
import os
import re
import threading
from collections.abc import Iterator

import pytest

from fleecenbd.cli import logs

logger = logging.getLogger("fleecenbd.tests")

pytestmark = pytest.mark.usefixtures("own_logs")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe: (end to read, end to write)."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue  # the test has closed it


def _handler(descriptor: int) -> logs.DescriptorHandler:
    handler = logs.DescriptorHandler(descriptor)
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


def _record(message: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message})


def _fill(descriptor: int) -> None:
    os.set_blocking(descriptor, False)
    try:
        while True:
            os.write(descriptor, bytes(4096))
    except BlockingIOError:
        os.set_blocking(descriptor, True)


def _drain(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    data = b""
    try:
        while piece := os.read(descriptor, 1 << 20):
            data += piece
    except BlockingIOError:
        pass
    return data


def test_a_line_has_time_level_and_message(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", as_json=False)
    logger.warning("session %s broke", "nightly")
    line = capfd.readouterr().err
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(rf"{moment} warning: session nightly broke\n", line)


def test_a_json_line_is_an_object_with_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", as_json=True)
    logger.info('a "quoted" word, ä and\na line end')
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    entry = json.loads(lines[0])
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "info",
        "logger": "fleecenbd.tests",
        "message": 'a "quoted" word, ä and a line end',
    }


@pytest.mark.parametrize("level", logs.LEVELS)
def test_lines_below_the_level_are_left_out(capfd: pytest.CaptureFixture[str], level: str) -> None:
    logs.set_up(level, as_json=False)
    for name in logs.LEVELS:
        getattr(logger, name)("said at %s", name)
    expected = logs.LEVELS[logs.LEVELS.index(level) :]
    assert re.findall(r"said at (\w+)", capfd.readouterr().err) == list(expected)


def test_other_people_s_libraries_are_heard_from_warning_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    logs.set_up("debug", as_json=False)
    logging.getLogger("asyncio").info("chatter")
    logging.getLogger("asyncio").warning("trouble")
    assert re.findall("chatter|trouble", capfd.readouterr().err) == ["trouble"]


def _log_an_exception() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("it went wrong")


@pytest.mark.parametrize("as_json", [False, True])
def test_an_exception_is_one_line_and_no_traceback(
    capfd: pytest.CaptureFixture[str], as_json: bool
) -> None:
    logs.set_up("info", as_json=as_json)
    _log_an_exception()
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "it went wrong: ValueError: two lines" in err


@pytest.mark.parametrize("as_json", [False, True])
def test_level_debug_adds_the_traceback(capfd: pytest.CaptureFixture[str], as_json: bool) -> None:
    logs.set_up("debug", as_json=as_json)
    _log_an_exception()
    err = capfd.readouterr().err
    assert "_log_an_exception" in err
    if as_json:
        assert "Traceback" in json.loads(err)["traceback"]


def test_an_exception_that_kills_a_thread_is_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    logs.set_up("info", as_json=False)

    def fail() -> None:
        raise RuntimeError("oh")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "internal error in a thread: RuntimeError: oh" in err


async def test_an_exception_that_nobody_awaits_is_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    logs.set_up("info", as_json=False)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(logs.loop_exception)
    loop.call_soon(lambda: 1 // 0)
    await asyncio.sleep(0)
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "internal error" in err
    assert "ZeroDivisionError" in err


def test_a_reader_that_does_not_read_costs_lines_and_no_time(pipe: tuple[int, int]) -> None:
    end, descriptor = pipe
    handler = _handler(descriptor)
    _fill(descriptor)
    for number in range(3):
        handler.handle(_record(f"lost {number}"))  # would hang here, were it to wait
    assert handler.lost == 3
    _drain(end)
    handler.handle(_record("heard"))
    assert handler.lost == 0
    assert _drain(end).decode().splitlines() == [
        "nobody read standard error: lines of this log lost: 3",
        "heard",
    ]


def test_a_line_that_was_cut_does_not_spoil_the_next_one(pipe: tuple[int, int]) -> None:
    end, descriptor = pipe
    handler = _handler(descriptor)
    handler.handle(_record("x" * (1 << 20)))  # more than any pipe holds by default
    assert handler.lost == 1
    assert set(_drain(end)) == {ord("x")}
    handler.handle(_record("whole"))
    assert _drain(end).decode().split("\n") == [
        "",
        "nobody read standard error: lines of this log lost: 1",
        "whole",
        "",
    ]


def test_a_reader_that_has_gone_is_no_error(pipe: tuple[int, int]) -> None:
    end, descriptor = pipe
    handler = _handler(descriptor)
    os.close(end)
    handler.handle(_record("to nobody"))
    assert handler.lost == 1


def test_a_record_that_cannot_be_formatted_is_no_error(pipe: tuple[int, int]) -> None:
    end, descriptor = pipe
    handler = _handler(descriptor)
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    handler.handle(_record("next"))
    assert b"next\n" in _drain(end)


def test_bytes_that_are_no_utf_8_are_shown(pipe: tuple[int, int]) -> None:
    end, descriptor = pipe
    _handler(descriptor).handle(_record("no name: \udcff"))
    assert _drain(end) == b"no name: \\udcff\n"


def test_a_failure_is_reported_in_the_log_s_own_form(capfd: pytest.CaptureFixture[str]) -> None:
    logs.report("before\nthe log is set up")
    logs.set_up("error", as_json=False)
    logs.report("for people")
    logs.set_up("error", as_json=True)
    logs.report("for machines")
    plain, people, machines = capfd.readouterr().err.splitlines()
    assert plain == "fleecenbd: before the log is set up"
    assert people == "fleecenbd: for people"
    assert json.loads(machines)["message"] == "for machines"
