"""What the tests with a real guest share. A missing tool is an error, never a skip."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.initramfs import build_initramfs, fetched_kernel
from tests.guest.machine import Machine

TOOLS = (
    "qemu-system-x86_64",
    "mkfs.ext4",
    "fsck.ext4",
    "debugfs",
    "nbdcopy",
)

MachineMaker = Callable[..., Machine]


@pytest.fixture(scope="session", autouse=True)
def _every_tool_is_there() -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    assert not missing, f"missing: {', '.join(missing)} (make tools installs them)"


@pytest.fixture(scope="session")
def machine_maker(tmp_path_factory: pytest.TempPathFactory) -> MachineMaker:
    """Makes machines from the folder for their logs, and the socket with their disk."""
    kernel = fetched_kernel()
    initramfs = build_initramfs(kernel, tmp_path_factory.mktemp("guest") / "initramfs")

    def make(folder: Path, socket: Path, *, reconnect_delay_s: int | None = None) -> Machine:
        if reconnect_delay_s is None:
            return Machine(kernel, initramfs, folder, socket)
        return Machine(kernel, initramfs, folder, socket, reconnect_delay_s=reconnect_delay_s)

    return make
