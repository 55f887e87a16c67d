"""The short way to read a command line: it reads what typer reads, or leaves it to typer."""

import shlex
from collections.abc import Sequence
from dataclasses import fields

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecenbd.cli import command_line
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.serve_options import Cache
from fleecenbd.cli.words import CHOICES, OPTIONS, ServeWords, plain_words

FLAGS = sorted(option for option, name in OPTIONS.items() if getattr(ServeWords, name) is False)
VALUES = ("0", "-", "a=b", "ü", "4k", "x y", "vda=disk.raw", "debug", "break-guest-write")


def _by_typer(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> ServeWords | None:
    """What typer makes of the same words; None where it refuses them."""
    read: list[ServeWords] = []

    def note(words: ServeWords) -> int:
        read.append(words)
        return 0

    monkeypatch.setattr(command_line, "serve", note)
    try:
        command_line.run(["serve", *arguments])
    except UsageError:
        return None
    return read[0] if read else None


def test_every_option_of_the_help_is_known_by_all_its_names() -> None:
    command = typer.main.get_command(command_line.app).commands["serve"]
    listed = {
        option: parameter.name
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("-") and parameter.name != "help"
    }
    assert listed == OPTIONS
    flags = {parameter.name for parameter in command.params if getattr(parameter, "is_flag", False)}
    assert flags - {"help"} == {OPTIONS[option] for option in FLAGS}
    assert {field.name for field in fields(ServeWords)} == {*OPTIONS.values(), "disk"}


def test_the_words_of_an_option_with_choices_are_typer_s() -> None:
    assert tuple(command_line.LogLevel) == CHOICES["log_level"]
    assert tuple(command_line.OnCbwError) == CHOICES["on_cbw_error"]
    assert tuple(Cache) == CHOICES["cache"]
    assert set(CHOICES) == {"cache", "log_level", "on_cbw_error"}


@pytest.mark.parametrize(
    "line",
    [
        "vm.raw",
        "vda=/dev/vg/vm1 vdb=data.raw -U /run/vm.sock --begin nightly",
        "--begin=nightly vm.raw --run 'nbdcopy \"$uri\" backup.raw'",
        "-r -U - vm.raw --shared 0 --json-log --log-level debug",
        "vm.raw -s --begin n --on-cbw-error break-guest-write --cbw-timeout 0.5",
        "vm.raw --cache none --discard ignore --discard vm=unmap --discard=x=y",
        "-e vda -P /run/f.pid -i ::1 -p 0 vda=a=b.raw --force-share --temp-limit=a=b",
    ],
)
def test_a_plain_command_line_is_read_as_typer_reads_it(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = shlex.split(line)
    words = plain_words(arguments)
    assert words is not None
    assert words == _by_typer(monkeypatch, arguments)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--help",
        "vm.raw -h",
        "-U f.sock",
        "vm.raw -U",
        "vm.raw -Uf.sock",
        "vm.raw -U=f.sock",
        "vm.raw -U ''",
        "vm.raw -U -r",
        "vm.raw -rs",
        "vm.raw --read-only=yes",
        "vm.raw --no-read-only",
        "vm.raw --read-only --read-only",
        "vm.raw --unix a -U b",
        "vm.raw --uni a",
        "vm.raw --log-level loud",
        "vm.raw --cache writethrough",
        "vm.raw --cache none --cache none",
        "vm.raw --discard ''",
        "vm.raw --discard ignore --discard \udcff",
        "vm.raw --on-cbw-error=''",
        "-- vm.raw",
        "vm.raw -",
        "''",
        "vm.raw \udcff",
        "vm.raw --begin \udcff",
    ],
)
def test_a_command_line_that_there_is_something_to_say_about_is_left_to_typer(line: str) -> None:
    assert plain_words(shlex.split(line)) is None


@settings(deadline=None)  # typer's first use imports it
@given(
    st.lists(
        st.one_of(
            st.sampled_from(sorted(OPTIONS)),
            st.sampled_from(VALUES),
            st.builds("{}={}".format, st.sampled_from(sorted(OPTIONS)), st.sampled_from(VALUES)),
            st.builds("{} {}".format, st.sampled_from(sorted(OPTIONS)), st.sampled_from(VALUES)),
            st.text(max_size=3),
        ),
        max_size=8,
    )
)
def test_whatever_is_read_here_typer_reads_to_the_same_words(pieces: list[str]) -> None:
    arguments = [word for piece in pieces for word in piece.split(" ", 1)]
    words = plain_words(arguments)
    if words is not None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert words == _by_typer(monkeypatch, arguments)
