"""A few backups of the long form (``make kills-pull``), each over several kills."""

from __future__ import annotations

from pathlib import Path

from tests.durability.pull_kills import KINDS, run


def test_a_pull_sits_out_kills_of_client_server_and_both(tmp_path: Path) -> None:
    met = run(5, 1, tmp_path)
    print(dict(met))
    assert met["backups"] == 5
    assert met["kills"] >= 5
    for who in ("client", "server", "both"):
        assert met[f"killed {who}"] > 0
    for kind in KINDS:
        assert met[f"to {kind}"] > 0
    assert met["resumed with something durable"] > 0
