"""A chain of backups over a disk whose server is killed again and again.

python -m tests.durability.kills [KILLS] [SEED]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.durability.world import BLOCKS, GRANULARITY, Totals, World

KILLS_PER_SESSION = 3
SESSIONS_PER_IMAGE = 4


def run(kills: int, seed: int, directory: Path) -> Totals:
    """At least that many kills with work in flight; AssertionError says what was violated."""
    totals = Totals()
    while totals.kills - totals.idle_kills < kills:
        folder = directory / f"image-{seed}"
        folder.mkdir()
        world = World(folder, seed, totals)
        try:
            _life(world, kills)
        except BaseException:
            print(f"seed {seed}; {totals}\n{(folder / 'log').read_text()}")
            raise
        finally:
            if world.server is not None:
                world.server.kill()
                world.server.wait()
        seed += 1
    return totals


def _life(world: World, kills: int) -> None:
    world.start()
    for number in range(SESSIONS_PER_IMAGE):
        if world.totals.kills - world.totals.idle_kills >= kills:
            break
        _session(world, f"s{number}")
        if world.random.random() < 0.5:
            world.stop()
            world.start()
    world.check_guest()
    world.stop()


def _session(world: World, name: str) -> None:
    _begin(world, name)
    world.kept, world.gone = set(), set()
    found = _session_of(world, name)
    if found["mode"] == ["use"]:
        world.check_chain(name)
    else:
        world.kept = set(range(BLOCKS))
    world.totals.sessions += 1
    backup = world.check_session(name)
    for _ in range(KILLS_PER_SESSION):
        world.kill_soon()
        world.write_until_killed(backup)
        world.start()
        assert _session_of(world, name)["state"] == "active"
        backup = world.check_session(name)
    if world.random.random() < 0.3:
        world.drain()
        world.stop()
        world.start()
        world.check_session(name)
    _finish(world, name)


def _begin(world: World, name: str) -> None:
    """Begin, perhaps with a kill in the middle of it, until it is begun."""
    world.write_some(200)
    world.drain()
    world.snapshot = world.image.read_bytes()
    if world.random.random() < 0.5:
        world.kill_soon(waits=False)
        for _ in range(3):  # begun and finished until the kill comes
            if world.ask("begin", name=name, mode="use-or-new", granularity=GRANULARITY) is None:
                break
            if world.ask("finish", name=name, failed=True) is None:
                break
        world.wait_killed()
        world.start()
    for session in world.ask("list"):
        # Begun, or on its way out, when the kill came.
        assert session["name"] == name
        assert world.ask("finish", name=name, failed=True)["failed"]
    assert world.ask("begin", name=name, mode="use-or-new", granularity=GRANULARITY)


def _session_of(world: World, name: str) -> dict[str, Any]:
    (found,) = world.ask("list")
    assert found["name"] == name
    return dict(found)


def _finish(world: World, name: str) -> None:
    """Finish, perhaps with a kill in the middle of it, until it is finished."""
    failed = world.random.random() < 0.4
    world.drain()
    if world.random.random() < 0.5:
        world.kill_soon(waits=False)
        answer = world.ask("finish", name=name, failed=failed)
        world.wait_killed()
        world.start()
        if world.ask("list"):
            assert answer is None, "it had said that it was finished"
            answer = world.ask("finish", name=name, failed=failed)
    else:
        answer = world.ask("finish", name=name, failed=failed)
    if not (failed if answer is None else answer["failed"]):
        world.last_good = world.snapshot
    assert world.ask("list") == []


def main() -> None:
    """The long form: prints what was killed, and what was in flight then."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(prefix="fleecenbd-kills-") as directory:
        print(run(kills, seed, Path(directory)))


if __name__ == "__main__":
    main()
