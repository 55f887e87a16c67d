"""Containers are recognised by their content, as QEMU's own tools write it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fleecenbd.storage.probe import PROBE_LENGTH, container_format


@pytest.mark.parametrize(
    ("qemu_format", "name"),
    [
        ("qcow", "qcow"),
        ("qcow2", "qcow2"),
        ("qed", "QED"),
        ("vmdk", "VMDK"),
        ("vdi", "VDI"),
        ("vpc", "VHD"),
        ("vhdx", "VHDX"),
        ("parallels", "Parallels"),
    ],
)
def test_a_container_made_by_qemu_is_recognised(
    tmp_path: Path, qemu_format: str, name: str
) -> None:
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", qemu_format, image, "1M"], check=True)
    assert container_format(image.read_bytes()[:PROBE_LENGTH]) == name


@pytest.mark.parametrize(
    "first_bytes",
    [
        b"",
        b"QF",
        bytes(PROBE_LENGTH),
        b"\xeb\x63\x90" + bytes(507) + b"\x55\xaa",  # a boot sector
        b"x" + b"QFI\xfb\x00\x00\x00\x03",
    ],
)
def test_a_raw_disk_is_no_container(first_bytes: bytes) -> None:
    assert container_format(first_bytes) is None


def test_a_disk_with_a_file_system_is_no_container(tmp_path: Path) -> None:
    image = tmp_path / "image"
    subprocess.run(["truncate", "-s", "4M", image], check=True)
    subprocess.run(["/sbin/mkfs.ext4", "-q", image], check=True)
    with image.open("r+b") as file:
        file.write(os.urandom(512))
    assert container_format(image.read_bytes()[:PROBE_LENGTH]) is None


@pytest.mark.parametrize("version", [1, 2])
def test_an_encrypted_volume_is_a_container(version: int) -> None:
    # The magic of LUKS's on-disk format, both versions. (qemu-img measures the machine's speed
    # before it makes one, and gives up on a busy machine.)
    first_bytes = b"LUKS\xba\xbe" + version.to_bytes(2, "big") + bytes(500)
    assert container_format(first_bytes) == "LUKS"


def test_a_vmdk_descriptor_is_a_container() -> None:
    assert container_format(b"# Disk DescriptorFile\nversion=1\n") == "VMDK"
