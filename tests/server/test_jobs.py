"""Jobs: what a child says and does, and what becomes of the job, of its session and of its process.

The pull is played by the test (playing.py); tests/e2e has those with a real one.
"""

import asyncio
import errno
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleecenbd.client import checksums
from fleecenbd.client import events as client_events
from fleecenbd.server import job_events, job_process, jobs
from fleecenbd.server.job_asks import JobAsk, checksum_algorithms
from fleecenbd.server.job_process import LINE_LENGTH_MAX, childs_environment
from tests.nbd import wire
from tests.server.playing import TARGET, Play, playing
from tests.server.room import CLUSTER, SIZE, pattern
from tests.server.test_sessions import break_session

# -- what is asked of the child ------------------------------------------------------------------


async def test_the_child_is_a_pull_over_the_server_s_own_socket() -> None:
    async with playing() as play:
        job = await play.start()
        child = await play.child()
        assert child.about["argv"] == [
            *("--progress", "json", "--commands", f"--session-id={job['session_id']}"),
            *("--", "nbd+unix:///vda@n?socket=/s", TARGET),
        ]
        await child.begins(job["session_id"])
        await child.completes()
        await play.ended(job["id"])


def test_every_option_is_handed_on() -> None:
    ask = JobAsk(
        "n",
        "vda",
        "qcow2:/t",
        force=True,
        resume=True,
        trim=False,
        verify=True,
        compress=True,
        checksum="sha256",
        bitmap="chain",
        rate=1000,
        connections=2,
        requests=8,
        retries=0,
        journal="/j",
    )
    ask.check()
    assert ask.arguments("nbd://h/x", "1-2") == [
        *("--progress", "json", "--commands", "--session-id=1-2"),
        *("--force", "--resume", "--no-trim", "--verify", "--compress"),
        *("--checksum=sha256", "--bitmap=chain", "--rate=1000", "--connections=2"),
        *("--requests=8", "--retries=0", "--journal=/j", "--", "nbd://h/x", "qcow2:/t"),
    ]
    once = JobAsk("n", "vda", "/t", read_once=True)
    once.check()
    assert "--read-once" in once.arguments("nbd://h/x", "1-2")
    assert "--no-keep" not in once.arguments("nbd://h/x", "1-2")
    last = JobAsk("n", "vda", "/t", finish=True)
    assert "--no-keep" in last.arguments("nbd://h/x", "1-2"), "no session is left to go on with"


async def test_a_child_has_pipes_and_nothing_else_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("LISTEN_FDS", "3")
    monkeypatch.setenv("OF_THE_USER", "stays")
    async with playing() as play:
        os.set_inheritable(inherited := os.open("/dev/null", os.O_RDONLY), True)
        try:
            job, child = await play.begun()
        finally:
            os.close(inherited)
        about = child.about
        # Its own socket to the test is 3.
        assert about["descriptors"] == [0, 1, 2, 3]
        assert about["session"] == about["pid"], "a signal for our group is not one for it"
        assert about["cwd"] == "/"
        assert "NOTIFY_SOCKET" not in about["environment"]
        assert "LISTEN_FDS" not in about["environment"]
        assert about["environment"]["OF_THE_USER"] == "stays"
        assert (await play.job(job["id"]))["pid"] == child.pid
        await child.completes()
        assert (await play.ended(job["id"]))["pid"] is None


@pytest.mark.parametrize(
    ("ours", "childs"), [("-900", "0"), ("0", "as it was"), ("7", "as it was")]
)
def test_a_child_is_killed_before_a_server_that_is_to_be_spared(
    tmp_path: Path, ours: str, childs: str
) -> None:
    (tmp_path / "ours").write_text(f"{ours}\n")
    (tmp_path / "childs").write_text("as it was")
    job_process.expose(tmp_path / "ours", tmp_path / "childs")
    assert (tmp_path / "childs").read_text() == childs


def test_what_systemd_says_to_one_process_is_not_said_to_its_child() -> None:
    ours = {"WATCHDOG_USEC": "1", "LISTEN_PID": "2", "STATE_DIRECTORY": "/s", "PATH": "/bin"}
    assert childs_environment(ours) == {"STATE_DIRECTORY": "/s", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target": "vda.raw"}, "target: 'vda.raw' is no absolute path and no NBD URI"),
        ({"target": "qcow2:vda.qcow2"}, "target: 'vda.qcow2' is no absolute path"),
        ({"target": "/a\0b"}, "is no absolute path"),
        ({"target": "nbd://h/\0"}, "target has a NUL byte"),
        ({"target": "/backup/"}, "'/backup/' is no file's name"),
        ({"target": "http://h/x"}, "is no absolute path and no NBD URI"),
        ({"journal": "j"}, "journal: 'j' is no absolute path"),
        ({"compress": True}, "compress is for qcow2: targets, and /t is none"),
        ({"read_once": True, "trim": False}, "read_once releases, and trim: false does not"),
        ({"read_once": True, "resume": True}, "what was read once cannot be resumed"),
        ({"checksum": "crc7"}, "checksum is one of blake2b, blake2s,"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(OSError, match=re.escape(text)) as caught:
        JobAsk(**{"session": "n", "disk": "vda", "target": "/t", **fields}).check()
    assert caught.value.errno == errno.EINVAL


def test_the_server_knows_the_checksums_that_a_pull_knows() -> None:
    assert checksum_algorithms() == checksums.algorithms()


@pytest.mark.parametrize(
    "event",
    [
        client_events.Start("s", "t", "id", 10, 9, 1),
        client_events.Progress(1, 2, 3, 4, 5.0, None, None, 6.0, True),
        client_events.Note("text"),
        client_events.Done(1, 2, 3, 4.0, client_events.Checksum("blake2b", "7c"), True, 5),
        client_events.Failed("why", "/t.part"),
    ],
)
def test_the_server_understands_what_a_pull_says(event: Any) -> None:
    heard = job_events.decode(msgspec.json.encode(event))
    assert type(heard).__name__ == type(event).__name__
    said = msgspec.to_builtins(event)
    for field in heard.__struct_fields__:
        assert msgspec.to_builtins(getattr(heard, field)) == said[field]


# -- what is refused -----------------------------------------------------------------------------


async def test_one_job_at_a_time_reads_an_export_or_writes_to_a_target() -> None:
    async with playing(disks=("vda", "vdb")) as play:
        job, child = await play.begun()
        control = play.control
        body = {"session": "n", "disk": "vda", "target": "/other"}
        assert await control.refused("POST", "jobs", body) == (
            409,
            f"job {job['id']} backs up vda@n already, to {TARGET}",
        )
        body = {"session": "n", "disk": "vdb", "target": f"raw:/backup/./{TARGET[8:]}"}
        status, message = await control.refused("POST", "jobs", body)
        assert status == 409
        assert message.startswith(f"job {job['id']} writes to raw:/backup/")
        await child.completes()
        await play.ended(job["id"])
        _, child = await play.begun()
        await child.completes()


async def test_what_cannot_be_backed_up_is_named() -> None:
    async with playing(disks=("vda", "vdb"), session=None) as play:
        control = play.control
        ask = {"session": "n", "disk": "vda", "target": TARGET}
        assert await control.refused("POST", "jobs", ask) == (
            404,
            "there is no session called 'n'",
        )
        await control.put("sessions/n", {"disks": ["vda"]})
        assert await control.refused("POST", "jobs", {**ask, "disk": "vdb"}) == (
            404,
            "disk 'vdb' is not in session n, which is over vda",
        )
        for target in ("vdb", "nbd+unix:///vda?socket=/s"):
            control.served.devices["vdb"].name = "/images/vdb"
            place = "raw:/images/x/../vdb" if target == "vdb" else target
            status, message = await control.refused("POST", "jobs", {**ask, "target": place})
            assert status == 422
            assert "which is served here; its guest would lose it" in message
        assert await control.refused("POST", "jobs", {**ask, "bitmap": "chain"}) == (
            422,
            "vda@n has no bitmap chain; it has none",
        )
        guest = await control.served.client("vda")
        await break_session(control.served, guest)
        status, message = await control.refused("POST", "jobs", ask)
        assert status == 409
        assert message.startswith("vda@n cannot be backed up: its session broke: old data could")
        assert control.jobs.views() == []


async def test_a_session_of_changes_is_backed_up_by_its_bitmap() -> None:
    async with playing(session=None) as play:
        control = play.control
        for mode in ("new", "use"):
            await control.put("sessions/n", {"bitmap": "chain", "bitmap_mode": mode})
            if mode == "new":
                await control.delete("sessions/n")
        ask = {"session": "n", "disk": "vda", "target": TARGET}
        status, message = await control.refused("POST", "jobs", ask)
        assert status == 422
        assert message.startswith("vda@n reads only what has changed: give bitmap chain")
        _, child = await play.begun(bitmap="chain")
        assert "--bitmap=chain" in child.about["argv"]
        await child.completes()


async def test_a_server_that_no_uri_leads_to_says_so() -> None:
    async with playing() as play:
        play.control.jobs._places.uris = lambda export: []  # type: ignore[method-assign]
        ask = {"session": "n", "disk": "vda", "target": TARGET}
        status, message = await play.control.refused("POST", "jobs", ask)
        assert status == 409
        assert message.startswith("a job cannot reach vda@n: no URI leads to it, since")


async def test_there_are_not_too_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RUNNING_MAX", 1)
    async with playing(disks=("vda", "vdb")) as play:
        _, child = await play.begun()
        body = {"session": "n", "disk": "vdb", "target": "/other"}
        assert await play.control.refused("POST", "jobs", body) == (
            409,
            "1 jobs are running already; wait for one",
        )
        await child.completes()


# -- what the child says -------------------------------------------------------------------------


async def test_progress_can_be_seen_and_the_result() -> None:
    async with playing() as play:
        job = await play.start(checksum="blake2b", verify=True)
        assert (job["state"], job["progress"], job["ended_at"]) == ("running", None, None)
        child = await play.child()
        await child.begins(job["session_id"], resumed=CLUSTER)
        seen = (await play.seen(job["id"], "progress"))["progress"]
        assert (seen["durable"], seen["resumed"], seen["to_copy"]) == (CLUSTER, CLUSTER, SIZE)
        await child.progresses(3 * CLUSTER)
        await child.says("note", text="a connection was made anew")
        now = await play.seen(job["id"], "note")
        assert now["note"] == "a connection was made anew"
        assert now["progress"] == {
            **{"size": SIZE, "to_copy": SIZE, "resumed": CLUSTER},
            **{"durable": 3 * CLUSTER, "read": 3 * CLUSTER, "released": 3 * CLUSTER},
            **{"speed": 1e6, "eta": 1.5, "temp": 4096, "elapsed": 2.0},
        }
        checksum = {"algorithm": "blake2b", "root": "7c1f"}
        await child.completes(checksum=checksum, verified=True)
        ended = await play.ended(job["id"])
        assert (ended["state"], ended["error"], ended["result"]) == ("complete", None, None)
        assert (ended["checksum"], ended["verified"]) == (checksum, True)
        assert ended["progress"]["durable"] == SIZE
        assert ended["progress"]["eta"] is None
        assert ended["started_at"] <= ended["ended_at"]
        assert (await play.control.get("sessions/n"))["state"] == "active"


async def test_what_it_fails_with_is_the_job_s_error() -> None:
    async with playing() as play:
        job, child = await play.begun()
        await child.says("failed", error="target: no space: 5 bytes are missing", kept="/t.part")
        child.exits(1)
        ended = await play.ended(job["id"])
        assert (ended["state"], ended["kept"]) == ("failed", "/t.part")
        assert ended["error"] == "target: no space: 5 bytes are missing"


@pytest.mark.parametrize("status", [0, 2])
async def test_a_child_that_goes_without_a_word_has_failed(status: int) -> None:
    async with playing() as play:
        job, child = await play.begun()
        await child.complains("Usage: pull\nfleecenbd: --rate is no option\n")
        child.exits(status)
        ended = await play.ended(job["id"])
        assert (ended["state"], ended["error"]) == (
            "failed",
            f"its process ended with status {status}: Usage: pull / fleecenbd: --rate is no option",
        )


async def test_a_child_that_is_killed_has_failed() -> None:
    async with playing() as play:
        job, child = await play.begun()
        os.kill(child.pid, signal.SIGKILL)
        ended = await play.ended(job["id"])
        assert (ended["state"], ended["error"]) == (
            "failed",
            "its process was killed by signal 9",
        )


async def test_what_is_complete_stays_so_whatever_comes_then() -> None:
    async with playing() as play:
        job, child = await play.begun()
        fields = {"durable": SIZE, "released": 0, "read": 0, "elapsed_s": 1}
        await child.says("done", checksum=None, verified=False, **fields)
        child.exits(1)
        assert (await play.ended(job["id"]))["state"] == "complete"


async def test_a_program_that_is_not_there_fails_the_job() -> None:
    async with playing() as play:
        play.control.jobs._program = ("/no/such/program",)
        job = await play.start()
        ended = await play.ended(job["id"])
        assert (ended["state"], ended["error"]) == (
            "failed",
            "/no/such/program cannot be started: No such file or directory",
        )


async def test_a_pull_from_another_server_is_ended() -> None:
    async with playing() as play:
        job = await play.start()
        child = await play.child()
        await child.begins("11111111-2222")
        assert await child.hears() == {"command": "cancel"}
        child.exits(130)
        ended = await play.ended(job["id"])
        assert ended["state"] == "failed"
        assert ended["error"].startswith("another server answers where this one should: session 11")


async def test_its_words_are_in_the_log_and_not_too_many(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_process, "LINES_LOGGED_MAX", 2)
    caplog.set_level(logging.INFO, "fleecenbd")
    async with playing() as play:
        job, child = await play.begun()
        await child.complains("one\n\ntwo\nthree\nfour\nwithout an end")
        await child.prints("no event\n" + "x" * (LINE_LENGTH_MAX + 5) + "\n")
        await child.completes()
        await play.ended(job["id"])
    name = f"job {job['id']} (vda@n)"
    said = [text for text in caplog.messages if text.startswith(name)]
    assert said[:4] == [
        f"{name}: begun, to {TARGET}",
        f"{name}: one",
        f"{name}: two",
        f"{name}: more of its lines are not logged",
    ]
    assert sum("is no event" in text for text in said) == 2
    assert said[-1] == f"{name}: complete"
    assert max(map(len, said)) < 300


async def test_a_process_that_it_leaves_behind_does_not_keep_the_job() -> None:
    async with playing() as play:
        job, child = await play.begun()
        await child.leaves_one()
        await child.completes()
        assert (await play.ended(job["id"]))["state"] == "complete"


# -- what is said to it --------------------------------------------------------------------------


async def test_it_is_paused_goes_on_and_is_limited() -> None:
    async with playing() as play:
        job, child = await play.begun(rate=5000)
        path = f"jobs/{job['id']}"
        listener = play.control.served.server.events.listen()
        assert (await play.control.post(f"{path}/pause"))["state"] == "paused"
        assert (await play.control.post(f"{path}/pause"))["state"] == "paused"
        assert (await play.control.post(f"{path}/resume"))["state"] == "running"
        assert (await play.control.post(f"{path}/rate", {"rate": 1000}))["rate"] == 1000
        assert (await play.control.post(f"{path}/rate", {"rate": None}))["rate"] is None
        heard = [await child.hears() for _ in range(5)]
        assert heard == [
            {"command": "pause"},
            {"command": "pause"},
            {"command": "resume"},
            {"command": "rate", "bytes_per_s": 1000},
            {"command": "rate", "bytes_per_s": None},
        ]
        await child.completes()
        await play.ended(job["id"])
        told = [await listener.next() for _ in range(3)]
        assert [event["event"] for event in told if event] == [
            *("job-paused", "job-resumed", "job-ended")
        ]
        play.control.served.server.events.forget(listener)
        for call, body in (("pause", None), ("resume", None), ("rate", {"rate": 1})):
            assert await play.control.refused("POST", f"{path}/{call}", body) == (
                409,
                f"job {job['id']} has ended (complete)",
            )


def _say_it_over_and_over(play: Play, job_id: str) -> None:
    for _ in range(10_000):
        play.control.jobs.set_rate(job_id, 1)


async def test_a_child_that_does_not_listen_makes_nobody_wait() -> None:
    async with playing() as play:
        job, child = await play.begun()
        os.kill(child.pid, signal.SIGSTOP)
        try:
            with pytest.raises(OSError, match="does not listen: its process") as caught:
                _say_it_over_and_over(play, job["id"])
            assert caught.value.errno == errno.EAGAIN
            path, body = f"jobs/{job['id']}/rate", {"rate": 1}
            status, message = await play.control.refused("POST", path, body)
            assert (status, str(caught.value.strerror)) == (503, message)
            assert (await play.job(job["id"]))["state"] == "running"
        finally:
            os.kill(child.pid, signal.SIGKILL)
        await play.ended(job["id"])


async def test_a_job_that_is_cancelled_keeps_what_is_durable() -> None:
    async with playing() as play:
        job, child = await play.begun()
        asked = asyncio.create_task(play.control.post(f"jobs/{job['id']}/cancel"))
        assert await child.hears() == {"command": "cancel"}
        assert await play.control.refused("POST", f"jobs/{job['id']}/pause") == (
            409,
            f"job {job['id']} is ending: cancelled",
        )
        await child.says("failed", error="interrupted", kept="/t.part")
        child.exits(130)
        ended = await asked
        assert (ended["state"], ended["error"], ended["kept"]) == (
            *("cancelled", "cancelled", "/t.part"),
        )
        assert await play.control.post(f"jobs/{job['id']}/cancel") == ended, "as often as you like"
        assert (await play.control.get("sessions/n"))["state"] == "active"


async def test_who_cancels_a_job_may_ask_it_to_keep_what_is_durable() -> None:
    async with playing() as play:
        job, child = await play.begun(keep=False)
        path = f"jobs/{job['id']}/cancel"
        assert (await play.control.refused("POST", path, body={"keep": 1}))[0] == 422
        asked = asyncio.create_task(play.control.post(path, {"keep": True}))
        assert [await child.hears() for _ in range(2)] == [
            {"command": "keep"},
            {"command": "cancel"},
        ]
        child.exits(130)
        assert (await asked)["state"] == "cancelled"


async def test_a_job_that_was_complete_before_it_was_cancelled_is() -> None:
    async with playing() as play:
        job, child = await play.begun()
        asked = asyncio.create_task(play.control.post(f"jobs/{job['id']}/cancel"))
        assert await child.hears() == {"command": "cancel"}
        await child.completes()
        assert (await asked)["state"] == "complete"
        assert (await play.control.refused("POST", f"jobs/{job['id']}/cancel"))[0] == 409


async def test_a_cancel_whose_caller_goes_goes_on() -> None:
    async with playing() as play:
        job, child = await play.begun()
        asked = asyncio.create_task(play.control.jobs.cancel(job["id"]))
        assert await child.hears() == {"command": "cancel"}
        asked.cancel()
        await asyncio.wait({asked})
        child.exits(130)
        assert (await play.ended(job["id"]))["state"] == "cancelled"


async def test_a_child_that_hangs_is_killed_with_all_that_it_has_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "CANCEL_S", 0.05)
    monkeypatch.setattr(jobs, "TERM_S", 0.05)
    async with playing() as play:
        job, child = await play.begun()
        await child.leaves_one()
        await child.hangs()
        ended = await play.control.post(f"jobs/{job['id']}/cancel")
        assert (ended["state"], ended["kept"]) == ("cancelled", None)
        assert await child.hears() == {"command": "cancel"}
        await child.ended()
    assert "has not ended after 0.05 s: SIGTERM" in caplog.text
    assert "has not ended in time: it is killed" in caplog.text


async def test_a_child_that_cannot_be_killed_is_told_and_can_be_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CANCEL_S", "TERM_S"):
        monkeypatch.setattr(jobs, name, 0.01)
    monkeypatch.setattr(job_process, "KILLED_WAIT_S", 0.01)
    async with playing() as play:
        job, child = await play.begun()
        await child.hangs()
        with monkeypatch.context() as patch:
            patch.setattr(os, "killpg", lambda group, number: None)
            status, message = await play.control.refused("POST", f"jobs/{job['id']}/cancel")
            assert status == 500
            assert f"its process {child.pid} hangs in a system call" in message
            assert (await play.job(job["id"]))["state"] == "running"
        assert (await play.control.post(f"jobs/{job['id']}/cancel"))["state"] == "cancelled"


# -- the session ---------------------------------------------------------------------------------


async def test_a_job_that_is_to_finish_its_session_does() -> None:
    async with playing() as play:
        job, child = await play.begun(finish=True)
        await child.completes()
        ended = await play.ended(job["id"])
        assert (ended["state"], ended["result"]) == ("complete", "success")
        seen = await play.control.get("sessions/n")
        assert (seen["state"], seen["result"]) == ("finished", "success")


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_job_that_is_to_finish_its_session_finishes_it_as_failed(how: str) -> None:
    async with playing() as play:
        job, child = await play.begun(finish=True)
        if how == "fails":
            child.exits(1)
            ended = await play.ended(job["id"])
        else:
            asked = asyncio.create_task(play.control.post(f"jobs/{job['id']}/cancel"))
            await child.hears()
            child.exits(130)
            ended = await asked
        assert ended["result"] == "failed"
        assert (await play.control.get("sessions/n"))["result"] == "failed"


async def test_a_session_waits_for_all_of_its_disks_to_be_finished_as_success() -> None:
    async with playing(disks=("vda", "vdb", "vdc")) as play:
        first, child = await play.begun(finish=True)
        await child.completes()
        assert (await play.ended(first["id"]))["result"] is None
        assert (await play.control.get("sessions/n"))["state"] == "active", "vdb may still come"
        second, child2 = await play.begun(disk="vdb", target="/b", finish=True)
        third, child3 = await play.begun(disk="vdc", target="/c")
        await child2.completes()
        assert (await play.ended(second["id"]))["result"] is None
        await child3.completes()
        assert (await play.ended(third["id"]))["result"] == "success"
        assert (await play.control.get("sessions/n"))["result"] == "success"


async def test_a_session_with_one_failed_job_of_two_is_finished_when_the_other_has_ended() -> None:
    async with playing(disks=("vda", "vdb")) as play:
        first, child = await play.begun(finish=True)
        second, child2 = await play.begun(disk="vdb", target="/b", finish=True)
        child.exits(1)
        assert (await play.ended(first["id"]))["result"] is None
        assert (await play.control.get("sessions/n"))["state"] == "active"
        await child2.completes()
        ended = await play.ended(second["id"])
        assert (ended["state"], ended["result"]) == ("complete", "failed")


async def test_a_failed_job_that_was_not_to_finish_can_be_tried_again() -> None:
    async with playing() as play:
        first, child = await play.begun()
        child.exits(1)
        await play.ended(first["id"])
        again, child = await play.begun(resume=True, finish=True)
        assert "--resume" in child.about["argv"]
        await child.completes()
        assert (await play.ended(again["id"]))["result"] == "success"


async def test_a_session_that_is_finished_under_a_job_stays_finished_as_it_was() -> None:
    async with playing() as play:
        job, child = await play.begun(finish=True)
        await play.control.delete("sessions/n")
        await play.control.put("sessions/n")
        await child.says("failed", error="vda@n: session n is finished (success)", kept=None)
        child.exits(1)
        ended = await play.ended(job["id"])
        assert (ended["state"], ended["result"]) == ("failed", None)
        assert ended["error"] == "vda@n: session n is finished (success)"
        seen = await play.control.get("sessions/n")
        assert seen["state"] == "active", "another one, of the same name"


async def test_a_job_ends_once_its_session_s_end_is_written_down() -> None:
    async with playing() as play:
        written = asyncio.Event()
        play.control.sessions.written = written.wait  # type: ignore[assignment]
        job, child = await play.begun(finish=True)
        ended = asyncio.create_task(play.ended(job["id"]))
        await child.completes()
        await child.ended()
        await play.finished("n")
        assert (await play.job(job["id"]))["state"] == "running"
        written.set()
        assert (await ended)["state"] == "complete"


# -- the end -------------------------------------------------------------------------------------


async def test_the_end_of_the_server_ends_its_jobs_and_finishes_no_session() -> None:
    async with playing() as play:
        job, child = await play.begun(finish=True)
        closing = asyncio.create_task(play.control.jobs.close())
        assert await child.hears() is None, "what is durable is kept, whatever was asked for"
        await closing
        (ended,) = play.control.jobs.ended
        assert (ended.state, ended.kept, ended.result) == ("cancelled", "/t.part", None)
        assert ended.error == "the server stopped; start it again with resume, in the same session"
        assert list(play.control.served.server.sessions) == ["n"]
        body = {"session": "n", "disk": "vda", "target": TARGET}
        assert await play.control.refused("POST", "jobs", body) == (
            503,
            "no job can begin: the server is stopping",
        )
        assert job["id"] == ended.id


async def test_the_end_of_the_server_waits_for_no_child_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "STOP_S", 0.05)
    async with playing() as play:
        job, child = await play.begun()
        await child.leaves_one()
        await child.hangs()
        cancel = asyncio.create_task(play.control.jobs.cancel(job["id"]))
        assert await child.hears() == {"command": "cancel"}
        await play.control.jobs.close()
        await child.ended()
        assert (await cancel).state == "cancelled"


async def test_a_server_that_stops_at_once_kills_its_jobs() -> None:
    async with playing() as play:
        job, child = await play.begun()
        await child.leaves_one()
        await child.hangs()
        task = play.control.jobs._jobs[job["id"]].task
        task.cancel()
        await asyncio.wait({task})
        await child.ended()
        assert play.control.jobs.views() == []


async def test_what_waits_for_the_state_directory_does_not_keep_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "STOP_S", 0.05)
    async with playing() as play:
        written = asyncio.Event()
        play.control.sessions.written = written.wait  # type: ignore[assignment]
        job, child = await play.begun(finish=True)
        await child.completes()
        await child.ended()
        await play.finished("n")
        await play.control.jobs.close()
        assert play.control.jobs.find(job["id"]).state == "complete"


async def test_the_last_jobs_stay_listed() -> None:
    async with playing() as play:
        play.control.jobs._program = (sys.executable, "-I", "-S", "-c", "")
        started = []
        for _ in range(jobs.ENDED_MAX + 1):
            started.append((await play.start())["id"])
            await play.ended(started[-1])
        assert [view.id for view in play.control.jobs.views()] == started[1:]
        assert len(set(started)) == len(started)
        status, message = await play.control.refused("GET", f"jobs/{started[0]}")
        assert status == 404
        assert message.startswith(f"there is no job '{started[0]}'")


# -- guests --------------------------------------------------------------------------------------


async def test_a_guest_s_write_waits_for_no_job() -> None:
    """The child reads a block, and does nothing more: as one whose target hangs."""
    async with playing() as play:
        served = play.control.served
        guest = await served.client("vda")
        job, child = await play.begun()
        backup = await served.client("vda@n")
        assert await backup.read(0, CLUSTER) == pattern(CLUSTER)
        os.kill(child.pid, signal.SIGSTOP)
        try:
            for offset in range(0, SIZE, CLUSTER):
                await guest.write(offset, b"new" * 4)
            assert (await backup.ask(wire.TRIM, 0, SIZE)).error == 0
            await guest.write(0, b"again")
        finally:
            os.kill(child.pid, signal.SIGKILL)
        await play.ended(job["id"])
