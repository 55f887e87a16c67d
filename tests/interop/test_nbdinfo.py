"""nbdinfo: the list of exports, what each offers, and maps of both meta contexts."""

import json
from itertools import pairwise
from typing import Any

from tests.disks import KIB, MIB
from tests.interop.conftest import META_CONTEXTS, Fleeced, not_behind_nbdkit
from tests.serving import connected, run, try_run


def _export(uri: str) -> dict[str, Any]:
    exports = json.loads(run("nbdinfo", "--no-content", "--json", uri))["exports"]
    assert len(exports) == 1
    export: dict[str, Any] = exports[0]
    return export


def _contexts(export: dict[str, Any]) -> list[str]:
    # libnbd 1.14 lists names, later versions also objects.
    return [entry if isinstance(entry, str) else entry["context"] for entry in export["contexts"]]


def test_the_list_names_every_export_with_a_description(fleeced: Fleeced) -> None:
    uri = f"nbd+unix://?socket={fleeced.server.unix}"
    exports = json.loads(run("nbdinfo", "--list", "--no-content", "--json", uri))["exports"]
    described = {export["export-name"]: export["description"] for export in exports}
    assert set(described) == {"vm", "vm@nightly"}
    assert described["vm"] == "guest disk vm"
    assert described["vm@nightly"].startswith("vm as of 20")
    assert "session nightly" in described["vm@nightly"]


def test_the_guest_export_offers_what_a_guest_needs(fleeced: Fleeced) -> None:
    export = _export(fleeced.guest)
    assert export["export-size"] == fleeced.size
    assert export["is_read_only"] is False
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df"):
        assert export[ability] is True, ability
    assert "base:allocation" in _contexts(export)
    assert export["block_size_minimum"] == 1
    assert export["block_size_maximum"] == 32 * MIB


def test_the_fleecing_export_offers_trim_and_is_not_marked_read_only(fleeced: Fleeced) -> None:
    export = _export(fleeced.backup)
    assert export["export-size"] == fleeced.size
    assert export["is_read_only"] is False
    for ability in ("can_flush", "can_trim", "can_multi_conn", "can_df"):
        assert export[ability] is True, ability
    assert export["can_fua"] is False
    assert "base:allocation" in _contexts(export)
    assert export["block_size_preferred"] == 64 * KIB


@not_behind_nbdkit(META_CONTEXTS)
def test_the_fleecing_export_offers_what_is_left_and_no_zeroing(fleeced: Fleeced) -> None:
    export = _export(fleeced.backup)
    assert "x-fleecenbd:access" in _contexts(export)
    # nbdkit offers WRITE_ZEROES wherever it offers TRIM; that they are refused shows elsewhere.
    assert export["can_zero"] is False


def test_the_size_can_be_asked_for_over_tcp(fleeced_over_tcp: Fleeced) -> None:
    uri = fleeced_over_tcp.server.tcp_uri("vm@nightly")
    assert int(run("nbdinfo", "--size", uri)) == fleeced_over_tcp.size


def test_a_map_covers_the_whole_disk(fleeced: Fleeced) -> None:
    for uri in (fleeced.guest, fleeced.backup):
        entries = json.loads(run("nbdinfo", "--map", "--json", uri))
        assert entries[0]["offset"] == 0
        for entry, following in pairwise(entries):
            assert entry["offset"] + entry["length"] == following["offset"]
        assert entries[-1]["offset"] + entries[-1]["length"] == fleeced.size


def test_a_hole_on_the_map_of_a_backup_was_zero_when_it_was_armed(fleeced: Fleeced) -> None:
    before = fleeced.before.read_bytes()
    entries = json.loads(run("nbdinfo", "--map", "--json", fleeced.backup))
    holes = [entry for entry in entries if entry["type"] & 2]
    assert holes, "a sparse disk of 8 MiB shows no zeroes at all"
    for entry in holes:
        offset, length = entry["offset"], entry["length"]
        assert not any(before[offset : offset + length]), f"data at [{offset}, {offset + length})"


@not_behind_nbdkit(META_CONTEXTS)
def test_the_access_map_shows_what_is_released_and_what_is_held(fleeced: Fleeced) -> None:
    with connected(fleeced.backup) as backup:
        backup.trim(MIB, 5 * MIB)
    entries = json.loads(run("nbdinfo", "--map=x-fleecenbd:access", "--json", fleeced.backup))
    flags_at = {
        offset: entry["type"]
        for entry in entries
        for offset in (0, 3 * MIB + 64 * KIB, 5 * MIB, 6 * MIB - 1, 6 * MIB, fleeced.size - 1)
        if entry["offset"] <= offset < entry["offset"] + entry["length"]
    }
    assert flags_at == {
        0: 3,  # overwritten by the guest: readable, from the temp image
        3 * MIB + 64 * KIB: 3,
        5 * MIB: 0,
        6 * MIB - 1: 0,
        6 * MIB: 1,  # readable, from the active image
        fleeced.size - 1: 3,
    }


def test_an_unknown_or_empty_export_name_is_refused(fleeced: Fleeced) -> None:
    for name in ("other", "vm@other", "vm@nightly@nightly", ""):
        result = try_run("nbdinfo", fleeced.server.uri(name))
        assert result.returncode != 0, name
        assert "export" in result.stderr


def test_nbdinfo_does_not_take_the_server_for_something_else(fleeced: Fleeced) -> None:
    assert "protocol: newstyle-fixed" in run("nbdinfo", fleeced.backup)
