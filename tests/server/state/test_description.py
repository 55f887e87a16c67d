"""The description: read back as written, and never misread."""

from __future__ import annotations

import json

import pytest

from fleecenbd.server.state.description import (
    VERSION,
    Damaged,
    Description,
    Foreign,
    Newer,
    decode,
    encode,
)
from tests.server.state.entries import WHOLE


def test_it_is_read_back_as_it_was_written() -> None:
    assert decode(encode(WHOLE)) == WHOLE


def test_it_names_every_file_once() -> None:
    assert WHOLE.files() == {"stamps-1", "bits-1", "fleece-1", "temp-1"}
    assert Description("boot").files() == set()


def test_it_is_json_that_a_person_can_read() -> None:
    text = encode(WHOLE).decode()
    assert json.loads(text)["sessions"][0]["fleeces"][0]["temp"]["file"] == "temp-1"
    assert text.count("\n") > 20


def test_a_field_of_a_later_version_that_keeps_the_number_does_no_harm() -> None:
    document = json.loads(encode(WHOLE))
    document["disks"][0]["colour"] = "green"
    assert decode(json.dumps(document).encode()) == WHOLE


def test_every_document_that_was_cut_off_is_damaged() -> None:
    document = encode(WHOLE).rstrip()
    for length in range(len(document)):
        with pytest.raises(Damaged):
            decode(document[:length])


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (b"\0" * 100, Damaged),
        (b'{"format": "fleecenbd state"}', Damaged),
        (b'{"format": "fleecenbd state", "version": 1}', Damaged),
        (b'{"format": "fleecenbd state", "version": "1"}', Damaged),
        (b"\xff\xfe", Damaged),
        (b'{"format": "fleecenbd state", "version": 2, "x": {}}', Newer),
        (b'{"servers": []}', Foreign),
        (b'{"format": "something"}', Foreign),
    ],
)
def test_what_cannot_be_read_is_told_apart(document: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        decode(document)


def test_a_newer_version_is_named() -> None:
    assert VERSION == 1
    with pytest.raises(Newer) as caught:
        decode(b'{"format": "fleecenbd state", "version": 7}')
    assert caught.value.args == (7,)


@pytest.mark.parametrize("name", ["../vm.raw", "/etc/passwd", "..", "", "a\0b"])
def test_a_name_that_leads_out_of_the_directory_is_damage(name: str) -> None:
    document = json.loads(encode(WHOLE))
    document["bitmaps"][0]["file"] = name
    with pytest.raises(Damaged, match="no name of a file"):
        decode(json.dumps(document).encode())
