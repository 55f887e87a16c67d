"""Default places, by the environment; and directories that are ours alone."""

import os
import stat
from pathlib import Path

import pytest

from fleecenbd.cli import places
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.places import (
    default_socket,
    default_state_directory,
    make_private_directory,
)


@pytest.mark.parametrize(
    ("environment", "user_id", "path"),
    [
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7/fleecenbd.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/user/0/fleecenbd.sock"),
        ({}, 0, "/run/fleecenbd.sock"),
        ({"XDG_RUNTIME_DIR": ""}, 0, "/run/fleecenbd.sock"),
        ({"XDG_RUNTIME_DIR": "relative"}, 0, "/run/fleecenbd.sock"),
    ],
)
def test_the_socket_is_in_the_runtime_directory(
    environment: dict[str, str], user_id: int, path: str
) -> None:
    assert default_socket(environment, user_id) == Path(path)


def test_without_a_runtime_directory_a_path_is_asked_for() -> None:
    with pytest.raises(UsageError, match="--unix"):
        default_socket({}, 7)


@pytest.mark.parametrize(
    ("environment", "user_id", "path"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "HOME": "/h"}, 0, "/var/lib/a"),
        ({"XDG_STATE_HOME": "/s", "HOME": "/h"}, 7, "/s/fleecenbd"),
        ({"HOME": "/h"}, 7, "/h/.local/state/fleecenbd"),
        ({"HOME": "/root"}, 0, "/var/lib/fleecenbd"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, 7, "/h/.local/state/fleecenbd"),
    ],
)
def test_state_is_in_the_user_s_state_directory(
    environment: dict[str, str], user_id: int, path: str
) -> None:
    assert default_state_directory(environment, user_id) == Path(path)


def test_without_a_home_a_state_directory_is_asked_for() -> None:
    with pytest.raises(UsageError, match="--state-dir"):
        default_state_directory({}, 7)


def test_directories_that_are_made_are_ours_alone_and_others_keep_their_mode(
    tmp_path: Path,
) -> None:
    before = os.umask(0)
    try:
        there = tmp_path / "there"
        there.mkdir(mode=0o755)
        make_private_directory(there / "a" / "b")
        make_private_directory(there / "a" / "b")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (there, there / "a", there / "a" / "b")]
    assert modes == [0o755, 0o700, 0o700]


def test_roots_state_directory_lets_other_users_services_reach_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "ROOTS_STATE", tmp_path / "fleecenbd")
    make_private_directory(tmp_path / "fleecenbd" / "web")
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("fleecenbd", "fleecenbd/web")
    ]
    assert modes == [0o711, 0o700]


def test_a_file_in_the_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="no folder"):
        make_private_directory(tmp_path / "file")
