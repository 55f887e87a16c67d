"""Copies that fail, the limit of a temp image, and parts of clusters."""

from __future__ import annotations

import asyncio
import errno

import pytest

from ..scene import CLUSTER, Scene, errno_of, read, simulated, trim

NEW = b"\x77" * CLUSTER


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_a_failed_copy_breaks_the_session_or_the_guests_write_never_both(policy: str) -> None:
    @simulated
    async def run() -> None:
        scene = Scene()
        fleece = await scene.arm(on_cbw_error=policy)
        fleece.temp.gate("write")
        write = scene.write(2)
        (await fleece.temp.reached("write")).fail(errno.ENOSPC)
        await asyncio.wait([write])
        error = write.exception()
        if policy == "break-snapshot":
            assert error is None
            assert fleece.broken is not None
            assert scene.now(2) == NEW
        else:
            assert isinstance(error, OSError)
            assert error.errno == errno.EIO
            assert fleece.broken is None
            assert scene.now(2) == scene.old(2)
            fleece.temp.open("write")
            await scene.write(2)
            assert await fleece.read(2 * CLUSTER, CLUSTER) == scene.old(2)

    run()


@simulated
async def test_temp_limit_counts_a_set_of_clusters_and_a_retry_costs_nothing() -> None:
    scene = Scene()
    fleece = await scene.arm(on_cbw_error="break-guest-write", temp_limit=2 * CLUSTER)
    fleece.temp.gate("write")
    write = scene.write(0, 2)
    (await fleece.temp.reached("write")).fail()
    await asyncio.wait([write])
    assert write.exception() is not None
    fleece.temp.open("write")
    refused = scene.write(5)
    await asyncio.wait([refused])
    assert refused.exception() is not None
    await scene.write(0, 2)
    assert fleece.temp.used_bytes() == 2 * CLUSTER
    await fleece.trim(0, CLUSTER)
    await scene.write(5)
    assert fleece.temp.used_bytes() == 2 * CLUSTER


@simulated
async def test_the_limit_is_not_given_back_before_the_punch_has_ended() -> None:
    scene = Scene()
    fleece = await scene.arm(on_cbw_error="break-guest-write", temp_limit=CLUSTER)
    await scene.write(0)
    fleece.temp.gate("trim")
    release = trim(fleece, 0)
    punching = await fleece.temp.reached("trim")
    refused = scene.write(1)
    await asyncio.wait([refused])
    assert refused.exception() is not None
    punching.go()
    await release
    await scene.write(1)
    assert await fleece.read(CLUSTER, CLUSTER) == scene.old(1)


@simulated
async def test_parts_of_a_cluster_add_up_as_a_union() -> None:
    scene = Scene()
    fleece = await scene.arm()
    half = CLUSTER // 2
    await fleece.trim(2 * CLUSTER, half)
    await fleece.trim(2 * CLUSTER, half)
    assert await fleece.read(2 * CLUSTER, CLUSTER) == scene.old(2)
    await fleece.trim(2 * CLUSTER + half - 1, half + 1)
    assert await errno_of(fleece.read(2 * CLUSTER, CLUSTER)) == errno.EINVAL


@simulated
async def test_the_last_partial_cluster_is_released_by_what_covers_it_whole() -> None:
    scene = Scene(size=2 * CLUSTER + 512)
    fleece = await scene.arm()
    await scene.disk.write(2 * CLUSTER, b"x" * 512)
    await fleece.trim(2 * CLUSTER + 511, 1)
    assert await fleece.read(2 * CLUSTER, 512) == scene.content[2 * CLUSTER :]
    await fleece.trim(2 * CLUSTER, 512)
    assert not fleece.access.any(2 * CLUSTER, 512)
    assert fleece.temp.used_bytes() == 0


@simulated
async def test_a_guests_discard_leaves_alone_what_a_session_does_not_let_go() -> None:
    scene = Scene(64)
    fleece = await scene.arm(on_cbw_error="break-guest-write", cbw_timeout_s=1)
    scene.active.gate("read", where=lambda offset, length: length == 32 * CLUSTER)
    reading = read(fleece, 32, 32)
    frozen = await scene.active.reached("read")
    scene.active.gate("read", where=lambda offset, length: False)
    # All of it is copied; half of it is frozen for longer than a guest may wait.
    await scene.write(0, 32, fill=1)
    late = scene.write(32, 32, fill=2)
    await asyncio.wait([late])
    assert late.exception() is not None
    await scene.disk.trim(0, 64 * CLUSTER)
    assert scene.now(32, 32) == scene.old(32, 32)
    frozen.go()
    assert await reading == scene.old(32, 32)
    await scene.disk.trim(0, 64 * CLUSTER)
    assert scene.now(0, 64) == bytes(64 * CLUSTER)


@simulated
async def test_a_guests_discard_leaves_alone_what_would_have_to_be_copied() -> None:
    scene = Scene(64)
    fleece = await scene.arm()
    await scene.disk.trim(0, scene.size)
    assert scene.now(0, 64) == scene.content
    assert fleece.temp.log == []
