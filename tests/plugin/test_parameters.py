"""nbdkit's parameters and command line, into the options of a server."""

import os
import subprocess
from pathlib import Path

import pytest

from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.options import ServeOptions
from fleecenbd.cli.values import DiskSpec
from fleecenbd.plugin.parameters import (
    _LONG,
    _SHORT,
    PARAMETERS,
    CommandLine,
    Parameters,
    read_command_line,
)


def _options(*given: str, activated: bool = False, line: str = "") -> ServeOptions:
    parameters = Parameters()
    for each in given:
        key, _, value = each.partition("=")
        parameters.add(key, value)
    return parameters.options(read_command_line(line.split()), activated=activated)


def _refused(*given: str) -> str:
    with pytest.raises(UsageError) as caught:
        _options(*given)
    return str(caught.value)


def test_disks_and_a_session_become_exports() -> None:
    options = _options("disk=vm.raw", "disk=b=/dev/vg/b", "session=n", "state-dir=/s")
    assert options.disks == (DiskSpec("vm", os.path.abspath("vm.raw")), DiskSpec("b", "/dev/vg/b"))
    assert options.exports == ["vm", "b", "vm@n", "b@n"]
    assert options.state_directory == Path("/s")


def test_paths_mean_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = _options("disk=sub/vm.raw", "session=n", "state-dir=state")
    assert options.disks[0].path == str(tmp_path / "sub" / "vm.raw")
    assert options.state_directory == options.guests_directory == tmp_path / "state"


def test_an_argument_without_a_key_is_a_disk() -> None:
    assert _options("disk=a.raw", "script=b.raw").exports == ["a", "b"]


def test_the_options_of_a_session_are_those_of_serve() -> None:
    given = ("cluster-size=64k", "on-cbw-error=break-guest-write", "cbw-timeout=3")
    options = _options("disk=vm.raw", "session=n", "temp-limit=1M", *given).session_options
    assert options.cluster_size == 64 << 10
    assert options.on_cbw_error == "break-guest-write"
    assert options.cbw_timeout_s == 3
    assert options.temp_limit == 1 << 20


def test_without_a_disk_nothing_is_served() -> None:
    assert "disk=[NAME=]IMAGE" in _refused("session=n")


def test_a_parameter_that_there_is_not_is_answered_with_those_that_there_are() -> None:
    message = _refused("sesion=n")
    assert "sesion=" in message
    for name in PARAMETERS:
        assert f"{name}=" in message


def test_a_disk_without_its_key_is_told_how_to_write_it() -> None:
    assert "disk=vda=/dev/vg/vm" in _refused("vda=/dev/vg/vm")


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - {"disk"}))
def test_a_parameter_other_than_disk_is_given_once(name: str) -> None:
    assert "twice" in _refused("disk=vm.raw", f"{name}=1", f"{name}=2")


@pytest.mark.parametrize("name", ["temp-limit", "cluster-size", "on-cbw-error", "cbw-timeout"])
def test_options_of_a_session_need_one(name: str) -> None:
    assert name in _refused("disk=vm.raw", f"{name}=4096")


@pytest.mark.parametrize(
    "given",
    [
        "session=a b",
        "session=",
        "state-dir=",
        "shared=2",
        "read-only=maybe",
        "default-export=other",
    ],
)
def test_what_a_parameter_cannot_mean_is_refused_by_name(given: str) -> None:
    assert given.split("=")[0] in _refused("disk=vm.raw", given)


@pytest.mark.parametrize(("text", "meant"), [("1", True), ("TRUE", True), ("off", False)])
def test_yes_and_no_are_written_as_nbdkit_writes_them(text: str, meant: bool) -> None:
    options = _options("disk=vm.raw", f"read-only={text}", f"force-share={text}")
    assert (options.read_only, options.force_share) == (meant, meant)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-f -U - python f.py disk=vm.raw", CommandLine()),
        ("-r python f.py disk=vm.raw", CommandLine(read_only=True)),
        ("python f.py disk=vm.raw --readonly", CommandLine(read_only=True)),
        ("-fr python f.py", CommandLine(read_only=True)),
        ("-P -r python f.py", CommandLine()),
        ("-e -s -i -r python f.py", CommandLine()),
        ("-s python f.py", CommandLine(own_client=True)),
        ("-U - python f.py a=-s --run true", CommandLine(own_client=True)),
        ("--run=true python f.py", CommandLine(own_client=True)),
        ("--ru true python f.py", CommandLine(own_client=True)),
        ("--filter=log --filter rate --tls-psk -r python f.py", CommandLine()),
        ("--no-such-option -r", CommandLine()),
    ],
)
def test_nbdkits_own_options_are_read_as_nbdkit_reads_them(
    line: str, expected: CommandLine
) -> None:
    assert read_command_line(line.split()) == expected


def test_every_option_that_nbdkit_has_is_known_with_or_without_its_argument() -> None:
    def told(option: str) -> list[str]:
        return subprocess.run(
            ["nbdkit", option], capture_output=True, text=True, check=True
        ).stdout.split()

    for option in told("--long-options"):
        name = option.removeprefix("--")
        known = name in _LONG or f"{name}=" in _LONG
        assert known, option
        # nbdkit tells by its own message whether an argument belongs to it.
        refused = subprocess.run(
            ["nbdkit", f"{option}=x", "--no-such-option"], capture_output=True, text=True
        ).stderr
        takes_none = "doesn't allow an argument" in refused
        assert takes_none == (name in _LONG), option
    for option in told("--short-options"):
        assert option[1] in _SHORT, option


def test_the_empty_name_means_the_backup_only_for_a_client_that_owns_nbdkit() -> None:
    given = ("disk=vm.raw", "session=n")
    assert _options(*given).empty_name is None
    assert _options(*given, line="-s python f.py").empty_name == "vm@n"
    assert _options(*given, line="python f.py --run x").empty_name == "vm@n"
    assert _options(*given, activated=True).empty_name == "vm@n"
    assert _options(*given, "disk=b.raw", line="-s python f.py").empty_name is None
    assert _options("disk=vm.raw", line="-s python f.py").empty_name is None
    assert _options(*given, "default-export=vm").empty_name == "vm"


def test_guests_are_remembered_only_where_they_could_come_back() -> None:
    given = ("disk=vm.raw", "state-dir=/s")
    assert _options(*given).guests_directory == Path("/s")
    assert _options(*given, activated=True).guests_directory == Path("/s")
    assert _options(*given, line="-s python f.py").guests_directory is None
