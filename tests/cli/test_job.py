"""``fleecenbd job``: what is typed and printed. The pulls are played (tests/server/playing.py)."""

import asyncio
import dataclasses
import json
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.cli import job_watching, pulling
from fleecenbd.cli.job_commands import absolute_target
from fleecenbd.cli.job_watching import outcome
from fleecenbd.cli.main import run
from fleecenbd.client.options import Backing, PullOptions
from fleecenbd.server.job_asks import JobAsk
from tests.cli.conftest import Fails
from tests.server.playing import TARGET, Play, playing
from tests.server.room import SIZE
from tests.serving import FLEECENBD

Does = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def does(own_logs: None, capfd: pytest.CaptureFixture[str]) -> Does:
    """Call a command of ``job`` against a play: exit status, standard output, standard error."""

    async def call(play: Play, *words: str) -> tuple[int, str, str]:
        control = f"--control={play.control.path}"
        status = await asyncio.to_thread(run, ["job", *words, control])
        out, err = capfd.readouterr()
        return status, str(out), str(err)

    return call


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_watching, "INTERVAL_S", 0.0)


async def test_start_prints_the_id_and_says_where_the_server_finds_the_target(
    does: Does, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with playing() as play:
        options = ("--finish", "--resume", "--no-trim", "--verify", "--compress", "--rate=1M")
        more = ("--checksum=sha256", "--connections=2", "--requests=9", "--retries=0")
        words = ("n", "vda", "qcow2:out.qcow2", "--journal=j", "--force")
        status, out, err = await does(play, "start", *words, *options, *more)
        assert (status, err) == (0, "")
        child = await play.child()
        argv = child.about["argv"]
        assert argv[-1] == f"qcow2:{tmp_path}/out.qcow2"
        assert set(argv) >= {
            *("--force", "--resume", "--no-trim", "--verify", "--compress", "--rate=1048576"),
            *("--checksum=sha256", "--connections=2", "--requests=9", "--retries=0"),
            f"--journal={tmp_path}/j",
        }
        job = await play.job(out.strip())
        assert out == f"{job['id']}\n"
        assert job["finish"]
        await child.begins(job["session_id"])
        await child.completes()


def test_a_pull_understands_what_a_job_asks_of_it(
    monkeypatch: pytest.MonkeyPatch, own_logs: None
) -> None:
    asked: list[PullOptions] = []

    async def never(options: PullOptions, told: Any, **_: Any) -> None:
        asked.append(options)

    monkeypatch.setattr(pulling, "pull", never)
    monkeypatch.setattr(pulling, "listen", lambda *_: None)
    everything = JobAsk(
        *("n", "vda", "qcow2:/t"),
        **{"finish": True, "force": True, "resume": True, "trim": False, "verify": True},
        **{"compress": True, "checksum": "sha256", "bitmap": "chain", "rate": 1000},
        **{"connections": 2, "requests": 8, "retries": 0, "journal": "/j"},
        **{"backing": "../b.raw", "backing_format": "raw"},
    )
    plain = JobAsk("n", "vda", "/t")
    once = JobAsk("n", "vda", "/t", read_once=True, keep=False)
    for ask in (everything, plain, once):
        assert run(["pull", *ask.arguments("nbd://h/x", "1-2")]) == 0
        options = asked.pop()
        assert (options.source, options.target) == ("nbd://h/x", ask.target)
        assert options.keep is (ask.keep and not ask.finish)
        backing = None if ask.backing is None else Backing(ask.backing, str(ask.backing_format))
        assert options.backing == backing
        assert options.session_id == "1-2"
        left_out = {"session", "disk", "target", "finish", "keep", "backing", "backing_format"}
        for name in {field.name for field in dataclasses.fields(ask)} - left_out:
            if (value := getattr(ask, name)) is not None:
                assert getattr(options, name) == value, name


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("/a/../b", "/b"),
        ("raw:/dev/sdx", "raw:/dev/sdx"),
        ("nbd://h/x", "nbd://h/x"),
        ("nbd+unix:///x?socket=/s", "nbd+unix:///x?socket=/s"),
    ],
)
def test_a_target_is_sent_as_the_server_understands_it(typed: str, sent: str) -> None:
    assert absolute_target(typed) == sent


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("start", "a/b", "vda", "/t"), "cannot be a session's name"),
        (("start", "n", "a/b", "/t"), "cannot be a disk's name"),
        (("start", "n", "vda", "qcow2:"), "TARGET is empty"),
        (("start", "n", "vda", "/t", "--rate", "0"), "--rate: 0 bytes a second would never end"),
        (("start", "n", "vda", "/t", "--checksum", "crc7"), "--checksum is one of"),
        (("start", "n", "vda", "/t", "--bitmap", "a b"), "cannot be a bitmap's name"),
        (("show", "a/b"), "cannot be a job's name"),
        (("rate", "1", "0"), "0 bytes a second would never end; job pause holds it"),
        (("rate", "1", "fast"), "SIZE: 'fast' is no size"),
        (("wait", "1", "--progress", "loud"), "--progress is one of"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(
    fails: Fails, words: tuple[str, ...], text: str
) -> None:
    assert text in fails("job", *words, "--control=/nowhere", status=2)


async def test_what_the_server_refuses_is_one_line(does: Does) -> None:
    async with playing() as play:
        status, out, err = await does(play, "start", "other", "vda", TARGET)
        assert (status, out) == (1, "")
        assert err == "fleecenbd: there is no session called 'other'\n"
        status, out, err = await does(play, "show", "1")
        assert (status, out) == (1, "")
        assert err.startswith("fleecenbd: there is no job '1'; ")


async def test_it_is_listed_shown_paused_limited_and_cancelled(does: Does) -> None:
    async with playing() as play:
        job, child = await play.begun()
        name = job["id"]
        await child.progresses(SIZE // 2)
        await child.says("note", text="told")
        await play.seen(name, "note")
        assert await does(play, "rate", name, "1M") == (0, "", "")
        assert await does(play, "pause", name) == (0, "", "")
        _, out, _ = await does(play, "list")
        assert re.search(
            rf"^{name} +paused +vda@n +32\.0 KiB +64\.0 KiB +50 % +\S+ \S+ +1\.5 s +- +{TARGET}",
            out,
            re.M,
        )
        _, out, _ = await does(play, "show", name)
        for line in (
            *(r"state +paused", r"note +told", r"disk +vda", rf"target +{TARGET}"),
            *(r"limit +1\.0 MiB/s", r"durable +32\.0 KiB of 64\.0 KiB, 50 %", r"temp +4\.0 KiB"),
            *(rf"pid +{child.pid}", r"time +2\.0 s, 1\.5 s left"),
        ):
            assert re.search(f"^{line}", out, re.M), line
        assert await does(play, "resume", name) == (0, "", "")
        _, out, _ = await does(play, "rate", name, "none", "--json")
        assert json.loads(out)["rate"] is None
        heard = [await child.hears() for _ in range(4)]
        assert [words["command"] for words in heard] == ["rate", "pause", "resume", "rate"]
        cancel = asyncio.create_task(does(play, "cancel", name))
        assert await child.hears() == {"command": "cancel"}
        child.exits(130)
        assert await cancel == (0, "", "")
        _, out, _ = await does(play, "list", "--json")
        assert [seen["state"] for seen in json.loads(out)["jobs"]] == ["cancelled"]
        status, _, err = await does(play, "pause", name)
        assert (status, err) == (1, f"fleecenbd: job {name} has ended (cancelled)\n")


async def test_a_cancel_that_comes_too_late_says_so(does: Does) -> None:
    async with playing() as play:
        job, child = await play.begun()
        cancel = asyncio.create_task(does(play, "cancel", job["id"]))
        assert await child.hears() == {"command": "cancel"}
        await child.completes()
        text = f"fleecenbd: warning: job {job['id']} had ended before: complete\n"
        assert await cancel == (0, "", text)


async def test_wait_shows_its_progress_as_a_pull_does(does: Does) -> None:
    async with playing() as play:
        job, child = await play.begun()
        wait = asyncio.create_task(does(play, "wait", job["id"], "--progress=json"))
        await child.progresses(SIZE // 2)
        await child.says("note", text="told")
        await play.seen(job["id"], "note")
        await child.completes(checksum={"algorithm": "blake2b", "root": "7c"}, verified=True)
        status, out, err = await wait
        assert (status, err) == (0, "")
        lines = [json.loads(line) for line in out.splitlines()]
        kinds = [line["event"] for line in lines]
        assert (kinds[0], kinds[-1]) == ("start", "done")
        assert kinds.count("note") == 1
        assert lines[-1]["checksum"] == {"algorithm": "blake2b", "root": "7c"}
        status, out, err = await does(play, "wait", job["id"])
        assert (status, out) == (0, "")
        assert err.startswith("fleecenbd: told\n")
        assert err.splitlines()[-1].startswith("fleecenbd: done: 64.0 KiB durable in 3.0 s")


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_wait_fails_with_the_job(does: Does, how: str) -> None:
    async with playing() as play:
        job, child = await play.begun()
        if how == "cancelled":
            cancel = asyncio.create_task(play.control.post(f"jobs/{job['id']}/cancel"))
            await child.hears()
        await child.says("failed", error="the target is full", kept="/t.part")
        child.exits(1)
        if how == "cancelled":
            await cancel
        status, out, err = await does(play, "wait", job["id"], "--progress=none")
        why = "was cancelled" if how == "cancelled" else "has failed: the target is full"
        assert (status, out) == (1, "")
        assert err == (
            f"fleecenbd: job {job['id']} {why}; /t.part keeps what is durable, for --resume\n"
        )


def test_what_is_kept_is_worth_nothing_once_the_session_is_finished() -> None:
    job: dict[str, Any] = {"id": "1", "state": "failed", "error": "why", "kept": "/t.part"}
    assert outcome({**job, "result": "failed"}) == "job 1 has failed: why"
    assert outcome({**job, "state": "complete", "result": None}) is None


async def test_ctrl_c_ends_the_looking_and_not_the_job() -> None:
    async with playing() as play:
        job, child = await play.begun()
        await child.progresses(SIZE // 2)
        process = await asyncio.create_subprocess_exec(
            *(FLEECENBD, "job", "wait", job["id"], "--progress=json"),
            f"--control={play.control.path}",
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert b'"event":"start"' in await process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        assert (await play.job(job["id"]))["state"] == "running"
        await child.completes()
        await play.ended(job["id"])


async def test_status_shows_jobs(own_logs: None, capfd: pytest.CaptureFixture[str]) -> None:
    async with playing() as play:
        job, child = await play.begun(finish=True)
        path = f"--control={play.control.path}"
        assert await asyncio.to_thread(run, ["status", path]) == 0
        assert re.search(rf"^{job['id']} +running +vda@n ", capfd.readouterr().out, re.M)
        await child.completes()
        await play.ended(job["id"])
        assert await asyncio.to_thread(run, ["status", path]) == 0
        assert re.search(
            rf"^{job['id']} +complete +vda@n .* 100 % +- +- +success +{TARGET}",
            capfd.readouterr().out,
            re.M,
        )
