"""What a guest's write waits for, how long, and how its wait is told."""

from __future__ import annotations

import asyncio
import errno

import pytest

from fleecenbd.engine.state import BREAK_GUEST_WRITE, BREAK_SNAPSHOT, FrozenRead
from tests.simulation.gated import GatedDevice

from .scene import CLUSTER, Scene, simulated, trim


@simulated
async def test_waits_are_counted_added_up_and_the_longest_is_kept() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    assert isinstance(fleece.temp, GatedDevice)
    for cluster, wait_s in enumerate((2.0, 3.0, 1.0)):
        fleece.temp.gate("write")
        write = scene.write(cluster)
        await asyncio.sleep(wait_s)
        fleece.temp.open()
        await write
    stats = fleece.stats
    assert stats.guest_waits == 3
    assert stats.guest_wait_s == pytest.approx(6.0)
    assert stats.guest_wait_max_s == pytest.approx(3.0)
    await scene.write(0, 3)
    assert stats.guest_waits == 3, "there was nothing to wait for"


@simulated
async def test_a_guest_that_a_trim_wakes_is_counted() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    assert isinstance(fleece.temp, GatedDevice)
    fleece.temp.gate("write")
    writes = [scene.write(cluster) for cluster in (0, 0, 1)]
    await fleece.temp.reached("write")
    release = trim(fleece, 0)
    await asyncio.gather(*writes[:2])
    assert fleece.stats.guest_released_by_trim == 2
    fleece.temp.open()
    await asyncio.gather(release, *writes)
    assert fleece.stats.copies_cancelled == 1


@simulated
async def test_ready_in_one_step_waits_for_nobody() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    ready_now = fleece.copy_before_write.ready_now
    assert isinstance(fleece.temp, GatedDevice)
    fleece.temp.gate("write")
    assert not ready_now(0, 1), "a copy that could block"
    write = scene.write(0)
    await fleece.temp.reached("write")
    assert not ready_now(0, 1), "a copy in flight"
    fleece.temp.open()
    await write
    assert ready_now(0, 1)
    read = fleece.state.frozen_reads.add(FrozenRead(0, 2))
    assert not ready_now(1, 2), "a frozen read"
    assert str(fleece.done) == "11000000"
    assert ready_now(2, 3)
    fleece.state.frozen_reads.remove(read)
    fleece.temp.gate("write")
    fleece.finish()
    assert ready_now(4, 5)
    assert not fleece.done.bits.any()


@pytest.mark.parametrize("policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE])
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "no space", "/temp/a"), "/temp/a: no space"),
        (OSError(errno.ENOSPC, "no space"), "no space"),
        (OSError("only words"), "only words"),
    ],
)
def test_the_cause_of_a_failed_copy_names_the_file(
    policy: str, error: OSError, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(8)
        fleece = await scene.arm(on_cbw_error=policy)
        assert isinstance(fleece.temp, GatedDevice)
        fleece.temp.gate("write")

        async def failing(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(fleece.temp, "pwrite", failing)
        text = f"old data could not be copied: {cause}"
        if policy == BREAK_GUEST_WRITE:
            with pytest.raises(OSError, match=f"vda@s: {text}$") as caught:
                await scene.write(0)
            assert caught.value.errno == errno.EIO
            assert fleece.broken is None
            assert (fleece.stats.copies_failed, fleece.stats.copies_done) == (1, 0)
            assert scene.now(0) == scene.old(0)
        else:
            await scene.write(0)
            assert fleece.broken == text
            assert scene.now(0) == b"\x77" * CLUSTER

    run()


@pytest.mark.parametrize("policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_guest_whose_time_is_up_says_for_what_it_waited(policy: str, frozen: bool) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(8)
        fleece = await scene.arm(on_cbw_error=policy, cbw_timeout_s=1.5)
        assert isinstance(fleece.temp, GatedDevice)
        if frozen:
            fleece.state.frozen_reads.add(FrozenRead(0, 1))
        else:
            fleece.temp.gate("write")
        what = "a backup read of the same range" if frozen else "copying old data"
        text = f"a guest write waited over 1.5 s for {what}"
        if policy == BREAK_GUEST_WRITE:
            with pytest.raises(OSError, match=f"vda@s: {text}$") as caught:
                await scene.write(0)
            assert caught.value.errno == errno.EIO
            assert fleece.broken is None
        else:
            await scene.write(0)
            assert fleece.broken == text
        assert asyncio.get_running_loop().time() == pytest.approx(1.5)
        assert fleece.stats.timeouts == 1
        assert fleece.stats.guest_waits == 1
        assert fleece.stats.frozen_waits == frozen
        fleece.temp.open()

    run()


@simulated
async def test_without_a_timeout_a_guest_waits_as_long_as_it_takes() -> None:
    scene = Scene(8)
    fleece = await scene.arm(cbw_timeout_s=0.0)
    assert isinstance(fleece.temp, GatedDevice)
    fleece.temp.gate("write")
    write = scene.write(0)
    await asyncio.sleep(100_000)
    assert not write.done()
    fleece.temp.open()
    await write
    assert fleece.stats.timeouts == 0


@simulated
async def test_a_timeout_shorter_than_a_second_is_a_timeout() -> None:
    scene = Scene(8)
    fleece = await scene.arm(cbw_timeout_s=0.25)
    assert isinstance(fleece.temp, GatedDevice)
    fleece.temp.gate("write")
    await scene.write(0)
    assert fleece.broken is not None
    fleece.temp.open()
