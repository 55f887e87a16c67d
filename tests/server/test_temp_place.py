"""Where temp images are to be: what can be asked for, and what the next server knows of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fleecenbd.server.temp_making import backing_of
from fleecenbd.server.temp_place import NBD, OWN_FILES, QCOW2, RAW, TempPlace, place_of


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        (OWN_FILES, RAW),
        (TempPlace(directory="/temps", preallocated=True), RAW),
        (TempPlace("qcow2", "/temps"), QCOW2),
        (TempPlace("nbd+unix:///x?socket=/s", overwrite=True), NBD),
        (TempPlace("nbds://h/{disk}"), NBD),
    ],
)
def test_what_is_asked_for_is_known_after_a_restart(place: TempPlace, kind: str) -> None:
    assert place.kind == kind
    assert place_of(place.lasting()) == place


def test_what_an_older_server_left_is_in_its_own_files() -> None:
    assert place_of({"ttl_s": 1.0}) == OWN_FILES


def test_what_a_later_server_left_is_no_error() -> None:
    assert place_of({"temp": "of a kind to come"}) == OWN_FILES


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"temp": "vmdk"}, "temp is raw, qcow2 or an NBD URI, not 'vmdk'"),
        ({"temp": "nbd://"}, "not 'nbd://'"),
        ({"temp": "http://h/"}, "not 'http://h/'"),
        ({"temp": ""}, "not ''"),
        ({"temp": "nbd://h:99999/vm"}, "temp: nbd://h:99999/vm: Port out of range"),
        ({"temp": "nbd://h/{vm}"}, "temp: {vm} stands for nothing; {disk} and {session} do"),
        ({"directory": "temps"}, "temp_dir is an absolute path, not 'temps'"),
        ({"directory": "/a\0b"}, "temp_dir is an absolute path"),
        ({"temp": "nbd://h", "directory": "/temps"}, "temp_dir is for files"),
        ({"temp": "qcow2", "preallocated": True}, "temp_prealloc is for raw temp images only"),
        ({"overwrite": True}, "temp_overwrite is for temp images at an NBD URI only"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        TempPlace(**fields)


def test_names_stand_in_a_uri_as_they_are() -> None:
    place = TempPlace("nbd://store/{disk}-{session}")
    assert place.uri("vda", "nightly") == "nbd://store/vda-nightly"
    assert TempPlace("nbd://store/t").uri("vda", "n") == "nbd://store/t"


@pytest.mark.parametrize(
    ("image", "backing"),
    [
        ("/images/vm.raw", ("/images/vm.raw", "raw")),
        ("qcow2:/images/vm.qcow2", ("/images/vm.qcow2", "qcow2")),
        ("nbd+unix:///vm?socket=/s", ("nbd+unix:///vm?socket=/s", "raw")),
    ],
)
def test_a_disk_s_image_is_named_as_qemu_knows_it(image: str, backing: tuple[str, str]) -> None:
    assert backing_of(image) == backing
