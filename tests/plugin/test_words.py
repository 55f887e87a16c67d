"""Messages in nbdkit's words, and what nbdkit shows of an exception."""

import traceback

import pytest

from fleecenbd.plugin.words import Told, hide_expected_tracebacks, in_nbdkits_words


@pytest.mark.parametrize(
    ("of_serve", "here"),
    [
        ("--temp-limit: 3 is less than", "temp-limit: 3 is less than"),
        ("--cluster-size is a power of two", "cluster-size= is a power of two"),
        (
            "--cbw-timeout cannot be given without --begin",
            "cbw-timeout= cannot be given without session=",
        ),
        ("folder for temp images with --state-dir", "folder for temp images with state-dir="),
        ("or give --force-share to use", "or give force-share=true to use"),
        ("or try --read-only)", "or try read-only=true)"),
        ("file systems (serve --shared N admits more)", "file systems"),
        ("give --default-export NAME", "give default-export=NAME"),
        ("names no image; write [NAME=]IMAGE", "names no image; write disk=[NAME=]IMAGE"),
        ("is the file, write NAME=a=b", "is the file, write disk=NAME=a=b"),
        ("there is --no-such-option", "there is --no-such-option"),
    ],
)
def test_a_message_of_serve_names_the_parameter(of_serve: str, here: str) -> None:
    assert in_nbdkits_words(of_serve) == here


def _shown(error: Exception) -> str:
    """As nbdkit's python plugin makes a text of an exception."""
    try:
        raise error
    except Exception as raised:
        return "".join(traceback.format_exception(type(raised), raised, raised.__traceback__))


def test_what_may_fail_is_one_line_and_a_fault_of_ours_has_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traceback, "format_exception", traceback.format_exception)
    hide_expected_tracebacks()
    assert _shown(Told("vm.raw: No such file")) == "vm.raw: No such file"
    assert "Traceback" in _shown(ZeroDivisionError())
