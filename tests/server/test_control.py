"""HTTP on the control socket: what can be asked, what is refused, and who keeps out whom."""

import asyncio
import errno
import json
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.server import control_socket as control_socket_module
from fleecenbd.server.control import application, openapi
from fleecenbd.server.control_socket import CONNECTIONS_MAX
from tests.nbd import wire
from tests.server.controlled import Control, controlled
from tests.server.room import CLUSTER, SIZE, pattern
from tests.server.test_sessions import break_session

DOCS = Path(__file__).parents[2] / "docs"


# -- sessions ------------------------------------------------------------------------------------


async def test_a_session_is_begun_read_and_finished_while_a_guest_writes() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        begun = await control.put("sessions/n")
        assert begun["name"] == "n"
        assert begun["warnings"] == []
        assert begun["disks"] == [
            {
                "disk": "vda",
                "export": "vda@n",
                "uri": "nbd+unix:///vda@n?socket=/s",
                "uris": ["nbd+unix:///vda@n?socket=/s"],
                "size": SIZE,
                "cluster_size": CLUSTER,
                "bitmap": None,
            }
        ]
        assert 0 <= begun["pause_ms"] < 1000
        await guest.write(0, b"x" * CLUSTER)
        backup = await control.served.client("vda@n")
        assert await backup.read(0, CLUSTER) == pattern(CLUSTER)
        assert (await backup.ask(wire.TRIM, CLUSTER, CLUSTER)).error == 0
        seen = await control.get("sessions/n")
        (fleece,) = seen["disks"]
        assert (seen["state"], seen["id"], seen["result"]) == ("active", begun["id"], None)
        assert fleece["accessible"] == SIZE - CLUSTER
        assert fleece["released"] == CLUSTER
        assert fleece["copied"] == CLUSTER
        assert fleece["temp"] == {
            "image": "vda@n",
            "now": CLUSTER,
            "peak": CLUSTER,
            "limit": None,
            "room": None,
        }
        assert fleece["copies"] == {"in_flight": 0, "done": 1, "cancelled": 0, "failed": 0}
        assert len(fleece["clients"]) == 1
        finished = await control.delete("sessions/n")
        assert (finished["state"], finished["result"]) == ("finished", "success")
        assert finished["disks"][0]["released"] == CLUSTER, "as it was just before its end"
        assert await backup.ended() == b""
        assert await control.get("sessions/n") == finished
        await guest.write(0, b"y")


async def test_the_wait_of_a_guest_write_can_be_seen() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        await control.put("sessions/n")
        temp = control.served.devices["vda@n"]
        temp.gate("write")
        await guest.post(wire.WRITE, 0, payload=b"!" * 512)
        write = await temp.reached("write")
        seen = (await control.get("sessions/n"))["disks"][0]
        assert seen["copies"]["in_flight"] == 1
        assert seen["guest_wait"]["count"] == 0
        write.go()
        await guest.reply()
        wait = (await control.get("sessions/n"))["disks"][0]["guest_wait"]
        assert wait["count"] == 1
        assert 0 <= wait["mean"] <= wait["p99"] <= wait["max"]


async def test_the_same_owner_with_the_same_options_gets_the_same_session() -> None:
    async with controlled() as control:
        body = {"owner": "cron", "temp_limit": 1 << 20, "ttl": 60}
        first = await control.put("sessions/n", body)
        assert await control.put("sessions/n", body, status=200) == first
        assert await control.refused("PUT", "sessions/n", {**body, "ttl": 61}) == (
            409,
            "cannot begin session n: session n is this owner's, but was begun with other options; "
            "finish it, or ask with the same ones",
        )
        for other in ({**body, "owner": "me"}, {}):
            status, message = await control.refused("PUT", "sessions/n", other)
            assert status == 409
            assert "there is a session called n already" in message
        await control.delete("sessions/n")
        again = await control.put("sessions/n", body)
        assert again["id"] != first["id"]


async def test_reading_once_is_one_of_the_options() -> None:
    async with controlled() as control:
        body = {"owner": "cron", "read_once": True}
        await control.put("sessions/n", body)
        assert (await control.get("sessions/n"))["read_once"] is True
        await control.put("sessions/n", body, status=200)
        assert (await control.refused("PUT", "sessions/n", {"owner": "cron"}))[0] == 409
        assert (await control.refused("PUT", "sessions/m", {"read_once": 1}))[0] == 422


async def test_nobody_in_particular_begins_a_session_once() -> None:
    async with controlled() as control:
        await control.put("sessions/n")
        assert (await control.refused("PUT", "sessions/n"))[0] == 409


async def test_who_asks_twice_at_once_gets_one_session() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        active = control.served.devices["vda"]
        active.gate("write")
        await guest.post(wire.WRITE, 0, payload=b"1" * 512)
        write = await active.reached("write")
        asks = [
            asyncio.ensure_future(control.call("PUT", "sessions/n", {"owner": "cron"}))
            for _ in range(2)
        ]
        while len(control.sessions._beginning) < 1 or control.socket.connections < 2:
            await control.served.settled()
        assert (await control.refused("PUT", "sessions/n", {"owner": "else"}))[0] == 409
        write.go()
        answers = [await ask for ask in asks]
        assert sorted(answer.status for answer in answers) == [200, 201]
        assert answers[0].body["id"] == answers[1].body["id"]
        active.open()
        await guest.reply()


async def test_a_session_over_some_disks_leaves_the_others_alone() -> None:
    async with controlled(disks=("vda", "vdb", "vdc")) as control:
        begun = await control.put("sessions/n", {"disks": ["vdc", "vda"]})
        assert [disk["disk"] for disk in begun["disks"]] == ["vdc", "vda"]
        disks = {disk["name"]: disk["sessions"] for disk in (await control.get("disks"))["disks"]}
        assert disks == {"vda": ["n"], "vdb": [], "vdc": ["n"]}


async def test_begin_warns_where_the_guest_may_write_past_the_server() -> None:
    async with controlled() as control:
        (warning,) = (await control.put("sessions/a"))["warnings"]
        assert warning == "no guest is connected to vda: does it write past this server?"
        await control.delete("sessions/a")
        guest = await control.served.client("vda")
        (warning,) = (await control.put("sessions/b"))["warnings"]
        assert warning.startswith("no guest has written to vda since its last session")
        await guest.write(0, b"x")
        assert (await control.put("sessions/c"))["warnings"] == []


async def test_twenty_finished_sessions_stay_listed_with_their_result() -> None:
    async with controlled() as control:
        for number in range(22):
            await control.put(f"sessions/n{number}")
            await control.delete(
                f"sessions/n{number}?result={'failed' if number % 2 else 'success'}"
            )
        await control.put("sessions/last")
        listed = (await control.get("sessions"))["sessions"]
        assert [session["name"] for session in listed] == [
            *(f"n{number}" for number in range(2, 22)),
            "last",
        ]
        assert [session["result"] for session in listed] == [*(["success", "failed"] * 10), None]
        assert (await control.refused("DELETE", "sessions/n3")) == (
            404,
            "session n3 is finished already (failed)",
        )


async def test_a_broken_session_says_why_and_ends_as_failed() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        await control.put("sessions/n")
        await break_session(control.served, guest)
        seen = await control.get("sessions/n")
        assert seen["state"] == "broken"
        assert seen["reason"].startswith("vda@n: old data could not be copied")
        assert seen["disks"][0]["released"] == SIZE
        finished = await control.delete("sessions/n?result=success")
        assert (finished["result"], finished["reason"]) == ("failed", seen["reason"])


async def test_the_temp_image_of_a_broken_session_holds_nothing_once_it_is_closed() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        await control.put("sessions/n")
        await guest.write(0, b"x" * CLUSTER)
        backup = await control.served.client("vda@n")
        temp = control.served.devices["vda@n"]
        temp.gate("read")
        await backup.post(wire.READ, 0, CLUSTER)
        read = await temp.reached("read")
        await break_session(control.served, guest)
        held = (await control.get("sessions/n"))["disks"][0]["temp"]["now"]
        assert held >= CLUSTER, "a call on it has not ended"
        read.go()
        await temp.wait_closed()
        seen = (await control.get("sessions/n"))["disks"][0]["temp"]
        assert (seen["now"], seen["peak"]) == (0, 2 * CLUSTER)


# -- disks ---------------------------------------------------------------------------------------


async def test_a_disk_comes_is_served_and_goes() -> None:
    async with controlled() as control:
        answer = await control.call("POST", "disks/vdb", {"image": "/image"})
        assert (answer.status, answer.body["name"], answer.body["size"]) == (201, "vdb", 4096)
        guest = await control.served.client("vdb")
        status, message = await control.refused("DELETE", "disks/vdb")
        assert status == 409
        assert message.startswith("disk vdb is in use by pid ")
        connection = control.served.connection("vdb")
        guest.vanish()
        await control.served.gone([connection])
        assert await control.delete("disks/vdb") is None
        assert (await control.refused("GET", "disks/vdb")) == (404, "there is no disk called 'vdb'")


async def test_a_disk_that_cannot_come_says_why() -> None:
    async with controlled() as control:
        assert await control.refused("POST", "disks/vda", {"image": "/image"}) == (
            409,
            "there is a disk called vda already",
        )
        assert await control.refused("POST", "disks/vdb", {"image": "/missing"}) == (
            422,
            "cannot open disk vdb: /missing: No such file",
        )
        for image in ("relative.raw", "raw:relative.raw", "/a\0b"):
            status, message = await control.refused("POST", "disks/vdb", {"image": image})
            assert status == 422
            assert "is no absolute path" in message
        assert (await control.refused("POST", "disks/vdb"))[0] == 422


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sessions", "disks"])
@pytest.mark.parametrize("name", ["a%2Fb", "a@b", "a%00b", "n" * 300, "..%2Fx", "%C3%BC", "%2E%2E"])
async def test_a_name_that_is_none_is_refused(kind: str, name: str) -> None:
    async with controlled() as control:
        for method in ("GET", "PUT" if kind == "sessions" else "POST", "DELETE"):
            body = {"image": "/image"} if method == "POST" else None
            status, message = await control.refused(method, f"{kind}/{name}", body)
            assert status == 400
            assert "1 to 100 letters, digits, '.', '_' and '-'" in message
            assert len(message) < 300
        assert control.served.server.sessions == {}


async def test_what_is_not_there_is_named() -> None:
    async with controlled() as control:
        assert await control.refused("GET", "sessions/n") == (404, "there is no session called 'n'")
        assert await control.refused("DELETE", "sessions/n") == (
            404,
            "there is no session called 'n'",
        )
        assert await control.refused("PUT", "sessions/n", {"disks": ["vdz"]}) == (
            404,
            "cannot begin session n: there is no disk called 'vdz'",
        )
        assert await control.refused("GET", "nothing") == (
            404,
            "there is no call GET /v1/nothing; docs/control.md lists all",
        )
        assert await control.refused("POST", "sessions/n") == (
            405,
            "there is no call POST /v1/sessions/n; there is: DELETE, GET, PATCH, PUT",
        )


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        (b"[" * 50000, 422, "Expected `object`, got `array`"),
        (b'{"disks":' + b"[" * 50000, 422, "at `body.disks[0]`"),
        (b"[]", 422, "Expected `object`, got `array`"),
        (b'{"tll": 3}', 422, "it has an unknown field `tll`"),
        (b'{"ttl": 0}', 422, "at `body.ttl`"),
        (b'{"ttl": "3"}', 422, "at `body.ttl`"),
        (b'{"ttl": 1e999}', 422, "Number out of range - at `body.ttl`"),
        (b'{"cbw_timeout": -1}', 422, "at `body.cbw_timeout`"),
        (b'{"temp_limit": -1}', 422, "at `body.temp_limit`"),
        (b'{"temp_limit": 99999999999999999999999}', 422, "at `body.temp_limit`"),
        (b'{"temp_limit": 1}', 422, "less than one cluster"),
        (b'{"cluster_size": 5000}', 422, "cluster_size is a power of two"),
        (b'{"on_cbw_error": "panic"}', 422, "at `body.on_cbw_error`"),
        (b'{"disks": "vda"}', 422, "at `body.disks`"),
        (b'{"disks": []}', 422, "session n would be over no disk"),
        (b'{"disks": ["vda", "vda"]}', 422, "a disk is named twice"),
        (b'{"disks": ["a/b"]}', 422, "at `body.disks[0]`"),
        (b'{"owner": ""}', 422, "at `body.owner`"),
        (b" " * 70000, 413, "the body is longer than 65536 bytes"),
    ],
)
async def test_a_body_that_is_none_is_refused(raw: bytes, status: int, words: str) -> None:
    async with controlled() as control:
        refused = await control.refused("PUT", "sessions/n", raw=raw)
        assert refused[0] == status, refused
        assert words in refused[1]
        assert control.served.server.sessions == {}
        assert await control.put("sessions/n")


@pytest.mark.parametrize("query", ["result=maybe", "result=", "resutl=failed", "x=1"])
async def test_a_result_that_is_none_finishes_nothing(query: str) -> None:
    async with controlled() as control:
        await control.put("sessions/n")
        assert (await control.refused("DELETE", f"sessions/n?{query}"))[0] == 422
        assert list(control.served.server.sessions) == ["n"]


async def test_a_temp_image_without_space_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    async with controlled() as control:

        def full(session: str, place: object) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device", "/state")

        monkeypatch.setattr(control.sessions._places, "make_temp", full)
        assert await control.refused("PUT", "sessions/n") == (
            507,
            "cannot begin session n: /state: No space left on device",
        )


async def test_a_fault_of_ours_is_one_line_and_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with controlled() as control:
        with monkeypatch.context() as planted:
            planted.setattr(control.sessions, "views", lambda: 1 / 0)
            assert await control.refused("GET", "sessions") == (
                500,
                "internal error: ZeroDivisionError; the server's log has more",
            )
        assert "internal error in GET /v1/sessions" in caplog.text
        assert await control.get("sessions") == {"sessions": []}


# -- connections ---------------------------------------------------------------------------------


async def test_a_thousand_connections_keep_neither_guests_nor_other_calls_out() -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, files[1]), files[1]))
    strangers: list[socket.socket] = []
    try:
        async with controlled() as control:
            guest = await control.served.client("vda")
            await control.put("sessions/n")
            before = len(os.listdir("/proc/self/fd"))
            for number in range(1000):
                while True:
                    try:
                        strangers.append(control.connect())
                        break
                    except BlockingIOError:  # the backlog is full: the server is to have its turn
                        await asyncio.sleep(0)
                if number % 100 == 0:
                    await guest.write(0, b"x" * 512)
            await control.served.settled()
            assert control.socket.connections <= CONNECTIONS_MAX
            here = len(os.listdir("/proc/self/fd")) - before - len(strangers)
            assert here <= CONNECTIONS_MAX
            assert (await control.get("sessions/n"))["state"] == "active"
            await guest.write(0, b"y" * 512)
            await control.delete("sessions/n")
    finally:
        for stranger in strangers:
            stranger.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, files)


async def test_a_call_at_work_keeps_its_place() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        active = control.served.devices["vda"]
        active.gate("write")
        await guest.post(wire.WRITE, 0, payload=b"1" * 512)
        write = await active.reached("write")
        begin = asyncio.ensure_future(control.call("PUT", "sessions/n"))
        while not control.sessions._beginning:
            await control.served.settled()
        strangers = [control.connect() for _ in range(CONNECTIONS_MAX + 10)]
        await control.served.settled()
        write.go()
        assert (await begin).status == 201
        for stranger in strangers:
            stranger.close()
        active.open()
        await guest.reply()


async def test_who_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket_module, "FIRST_CALL_TIMEOUT_S", 0.05)
    async with controlled() as control:
        await control.get("disks")
        stranger = control.connect()
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recv(stranger, 10) == b""
        stranger.close()


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "BODY_TIMEOUT_S", 0.05)
    async with controlled() as control:
        await control.get("disks")
        slow = control.connect()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(
            slow, b"PUT /v1/sessions/n HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        )
        async with asyncio.timeout(10):
            assert b" 408 " in (await loop.sock_recv(slow, 1000)).splitlines()[0]
        assert control.served.server.sessions == {}
        slow.close()


async def test_what_is_no_http_is_answered_and_nobody_is_hurt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with controlled() as control:
        stranger = control.connect()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(stranger, b"NBDMAGIC\x00\xff\r\n\r\n")
        async with asyncio.timeout(10):
            assert b" 400 " in await loop.sock_recv(stranger, 1000)
        stranger.close()
        assert await control.get("sessions") == {"sessions": []}
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_who_changes_something_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fleecenbd")
    async with controlled() as control:
        await control.put("sessions/n")
        await control.refused("PUT", "sessions/n")
        await control.get("sessions")
        await control.delete("sessions/n")
        await control.served.settled()
    who = f"control: pid {os.getpid()}, uid {os.getuid()}, gid {os.getgid()}"
    lines = [record.getMessage() for record in caplog.records if "control: pid" in record.message]
    assert lines == [
        f"{who}: PUT /v1/sessions/n: 201",
        f"{who}: PUT /v1/sessions/n: 409",
        f"{who}: DELETE /v1/sessions/n: 200",
    ]


# -- events, metrics, the document ---------------------------------------------------------------


async def _events(control: Control, count: int, work: Any) -> list[dict[str, Any]]:
    async with control.http.get("http://x/v1/events") as answer:
        await work()
        lines = [json.loads(await answer.content.readline()) for _ in range(count)]
    return [{key: line[key] for key in line if key not in ("time", "id")} for line in lines]


async def test_what_happens_is_told_as_json_lines() -> None:
    async with controlled() as control:

        async def happen() -> None:
            guest = await control.served.client("vda")
            await control.put("sessions/n")
            await break_session(control.served, guest)
            await control.delete("sessions/n")

        pid = f"pid {os.getpid()}"
        seen = await _events(control, 4, happen)
        assert seen[2].pop("reason").startswith("old data could not be copied")
        assert seen == [
            {"event": "client-came", "export": "vda", "client": pid},
            {"event": "session-begun", "session": "n", "disks": ["vda"]},
            {"event": "session-broken", "session": "n", "disk": "vda"},
            {"event": "session-finished", "session": "n", "disks": ["vda"], "result": "failed"},
        ]


async def test_the_stream_of_events_ends_with_the_server() -> None:
    async with controlled() as control, control.http.get("http://x/v1/events") as answer:
        control.served.server.events.end()
        async with asyncio.timeout(10):
            assert await answer.read() == b""


async def test_too_many_listeners_are_refused() -> None:
    async with controlled() as control:
        answers = [
            await control.http.get("http://x/v1/events")
            for _ in range(application.EVENT_LISTENERS_MAX)
        ]
        status, message = await control.refused("GET", "events")
        assert (status, message) == (503, "16 clients listen to events already")
        for answer in answers:
            answer.close()


async def test_metrics_tell_of_disks_sessions_and_the_process() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        await control.put("sessions/n", {"temp_limit": 1 << 20})
        await guest.write(0, b"x" * 512)
        async with control.http.get("http://x/metrics") as answer:
            lines = (await answer.text()).splitlines()
        assert 'fleecenbd_disk_guest_writes_total{disk="vda"} 1.0' in lines
        assert 'fleecenbd_disk_clients{disk="vda"} 1.0' in lines
        assert f'fleecenbd_fleece_temp_bytes{{disk="vda",session="n"}} {CLUSTER:.1f}' in lines
        assert 'fleecenbd_fleece_temp_limit_bytes{disk="vda",session="n"} 1.048576e+06' in lines
        assert any(line.startswith("process_resident_memory_bytes ") for line in lines)
        await control.delete("sessions/n?result=failed")
        async with control.http.get("http://x/metrics") as answer:
            lines = (await answer.text()).splitlines()
        assert 'fleecenbd_sessions_finished_total{result="failed"} 1.0' in lines
        assert not any('session="n"' in line for line in lines)


async def test_where_only_metrics_are_served_nothing_can_be_changed() -> None:
    async with controlled(metrics_only=True) as control:
        assert (await control.refused("PUT", "sessions/n"))[0] == 404
        assert (await control.refused("GET", "sessions"))[0] == 404
        async with control.http.get("http://x/metrics") as answer:
            assert answer.status == 200
        assert control.served.server.sessions == {}


async def test_the_document_in_docs_is_that_of_the_code() -> None:
    assert (DOCS / "openapi.json").read_text() == openapi.text(), (
        "python -m fleecenbd.server.control.openapi > docs/openapi.json"
    )
    async with controlled() as control:
        assert await control.get("openapi.json") == json.loads(openapi.text())


def test_a_description_in_the_document_has_no_indent_of_the_source() -> None:
    described = [
        schema["description"]
        for schema in openapi.document()["components"]["schemas"].values()
        if "description" in schema
    ]
    assert any("\n" in text for text in described)
    assert not any("\n " in text for text in described)


async def test_every_call_is_in_the_document_and_on_its_page() -> None:
    async with controlled() as control:
        await control.get("disks")
        runner = control.socket._runner
        assert runner is not None
        served = {
            (route.method.lower(), route.resource.canonical)
            for route in runner.app.router.routes()
            if route.method != "HEAD" and route.resource is not None
        }
    assert served == {(call.method, call.path) for call in openapi.CALLS}
    page = (DOCS / "control.md").read_text()
    for call in openapi.CALLS:
        shown = call.path.replace("{session}", "NAME").replace("{disk}", "DISK")
        shown = shown.replace("{bitmap}", "BITMAP").replace("{job}", "ID")
        assert f"`{call.method.upper()} {shown}" in page, call
