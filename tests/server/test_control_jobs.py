"""Jobs over HTTP: what is refused before anything starts, and where jobs can be seen."""

import pytest

from tests.server.controlled import controlled
from tests.server.playing import TARGET, playing
from tests.server.room import SIZE

ASK = {"session": "n", "disk": "vda", "target": TARGET}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({}, 422, "missing required field `session`"),
        ({"session": "n", "disk": "vda"}, 422, "missing required field `target`"),
        ({**ASK, "targets": "/t"}, 422, "unknown field `targets`"),
        ({**ASK, "session": "a/b"}, 422, "at `body.session`"),
        ({**ASK, "session": ".."}, 400, "'..' cannot be a session's name"),
        ({**ASK, "disk": "vda\n"}, 400, "cannot be a disk's name"),
        ({**ASK, "bitmap": "."}, 400, "'.' cannot be a bitmap's name"),
        ({**ASK, "target": ""}, 422, "at `body.target`"),
        ({**ASK, "target": "x" * 5000}, 422, "at `body.target`"),
        ({**ASK, "target": "vda.raw"}, 422, "'vda.raw' is no absolute path"),
        ({**ASK, "rate": 0}, 422, "at `body.rate`"),
        ({**ASK, "rate": "fast"}, 422, "at `body.rate`"),
        ({**ASK, "connections": 0}, 422, "at `body.connections`"),
        ({**ASK, "requests": 2000}, 422, "at `body.requests`"),
        ({**ASK, "retries": -1}, 422, "at `body.retries`"),
        ({**ASK, "checksum": "crc7"}, 422, "checksum is one of"),
        ({**ASK, "finish": 1}, 422, "at `body.finish`"),
        ({**ASK, "base": "/b"}, 422, "unknown field `base`"),
        ({**ASK, "backing": "/b"}, 422, "backing and backing_format belong together"),
        ({**ASK, "backing": "b", "backing_format": "raw"}, 422, "backing is for qcow2: targets"),
    ],
)
async def test_what_no_job_can_be_is_refused(body: object, status: int, text: str) -> None:
    async with controlled(session="n", program=("/no/such/program",)) as control:
        refused, message = await control.refused("POST", "jobs", body)
        assert (refused, text in message) == (status, True), message
        assert len(message) < 400
        assert await control.get("jobs") == {"jobs": []}


async def test_a_job_that_is_not_there_is_named() -> None:
    async with controlled() as control:
        for method, path in (
            *(("GET", ""), ("POST", "/pause"), ("POST", "/resume"), ("POST", "/cancel")),
        ):
            status, message = await control.refused(method, f"jobs/1{path}")
            assert status == 404
            assert message.startswith("there is no job '1'")
        assert (await control.refused("POST", "jobs/1/rate", {"rate": None}))[0] == 404
        assert (await control.refused("POST", "jobs/1/rate", {}))[0] == 422
        assert (await control.refused("POST", "jobs/1/rate", {"rate": -1}))[0] == 422
        assert (await control.refused("POST", "jobs/a%2Fb/pause"))[0] == 400
        assert (await control.refused("DELETE", "jobs/1"))[0] == 405


async def test_a_job_is_in_the_status_in_the_list_and_among_the_events() -> None:
    async with playing() as play:
        control = play.control
        listener = control.served.server.events.listen()
        job, child = await play.begun()
        await child.progresses(4096)
        running = await play.seen(job["id"], "progress")
        assert (await control.get("status"))["jobs"] == [running]
        assert (await control.get("jobs"))["jobs"] == [running]
        child.exits(1)
        ended = await play.ended(job["id"])
        assert (await control.get("status"))["jobs"] == [ended]
        begun, *_, told = [await listener.next() for _ in range(2)]
        control.served.server.events.forget(listener)
        about = {"job": job["id"], "session": "n", "disk": "vda", "target": TARGET}
        assert begun is not None
        assert told is not None
        assert begun == {"event": "job-started", "time": begun["time"], **about}
        error = {"state": "failed", "error": ended["error"]}
        assert told == {"event": "job-ended", "time": told["time"], **about, **error}


async def test_jobs_are_counted_for_prometheus() -> None:
    async with playing() as play:

        async def metrics() -> list[str]:
            async with play.control.http.get("http://x/metrics") as answer:
                return (await answer.text()).splitlines()

        job, child = await play.begun(resume=True)
        await child.progresses(12288)
        await play.control.post(f"jobs/{job['id']}/pause")
        assert await child.hears() == {"command": "pause"}
        while 'fleecenbd_job_durable_bytes{disk="vda",session="n"} 12288.0' not in (
            seen := await metrics()
        ):
            pass
        assert 'fleecenbd_jobs{state="paused"} 1.0' in seen
        assert 'fleecenbd_jobs{state="running"} 0.0' in seen
        assert f'fleecenbd_job_to_copy_bytes{{disk="vda",session="n"}} {float(SIZE)}' in seen
        assert "fleecenbd_jobs_durable_bytes_total 12288.0" in seen
        await child.completes()
        await play.ended(job["id"])
        seen = await metrics()
        assert 'fleecenbd_jobs{state="paused"} 0.0' in seen
        assert 'fleecenbd_jobs_ended_total{result="complete"} 1.0' in seen
        assert 'fleecenbd_jobs_ended_total{result="failed"} 0.0' in seen
        assert f"fleecenbd_jobs_durable_bytes_total {float(SIZE)}" in seen
        assert not [line for line in seen if line.startswith("fleecenbd_job_durable_bytes{")]


async def test_metrics_alone_show_jobs_and_cannot_change_them() -> None:
    async with controlled(metrics_only=True) as control:
        async with control.http.get("http://x/metrics") as answer:
            assert 'fleecenbd_jobs_ended_total{result="complete"} 0.0' in await answer.text()
        async with control.http.post("http://x/v1/jobs", json=ASK) as refused:
            assert refused.status == 404
