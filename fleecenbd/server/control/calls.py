"""The calls: from a request's parts to an answer, without HTTP."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from msgspec import UNSET

from fleecenbd import __version__
from fleecenbd.engine.recording import BitmapRequest
from fleecenbd.engine.session import SessionOptions
from fleecenbd.server.asks import Ask
from fleecenbd.server.control.bodies import (
    AddBitmapBody,
    AddDiskBody,
    BeginAnswer,
    BeginBody,
    BegunDisk,
    BitmapList,
    Disks,
    MergeBody,
    SessionList,
    SetBody,
    Status,
)
from fleecenbd.server.control.errors import CallError, from_os_error
from fleecenbd.server.hooks import Hooks
from fleecenbd.server.jobs import Jobs
from fleecenbd.server.names import bad_name, is_name
from fleecenbd.server.places import Places
from fleecenbd.server.sessions import Begun, Sessions
from fleecenbd.server.temp_place import TempPlace
from fleecenbd.server.views import BitmapView, DiskView, SessionView, bitmap_view, own_view

_IMAGE = re.compile(r"^(raw|qcow2):")
_NBD_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")

BodyT = TypeVar("BodyT")

RESULTS = ("success", "failed")


def decode(body: bytes, kind: type[BodyT]) -> BodyT:
    """The body of a call. Raises CallError: 400 for what is no JSON, 422 for what does not fit."""
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise CallError(422, f"the body is not as it should be: {_plain(str(error))}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CallError(400, f"the body is no JSON: {error}") from None


def _plain(text: str) -> str:
    return text.replace("Object contains", "it has an").replace(" - at `$", " - at `body")


def check_name(name: str, whose: str) -> str:
    """Raises CallError(400)."""
    if not is_name(name):
        raise CallError(400, bad_name(name, whose))
    return name


class Calls:
    """What can be asked of one server."""

    def __init__(self, sessions: Sessions, jobs: Jobs, places: Places, hooks: Hooks) -> None:
        self.sessions = sessions
        self.jobs = jobs
        self._places = places
        self._hooks = hooks

    # -- looking ---------------------------------------------------------------------------

    def status(self) -> Status:
        """Everything at one moment."""
        return Status(
            version=__version__,
            pid=os.getpid(),
            disks=self.sessions.disk_views(),
            sessions=self.sessions.views(),
            jobs=self.jobs.views(),
        )

    def disks(self) -> Disks:
        return Disks(self.sessions.disk_views())

    def disk(self, name: str) -> DiskView:
        try:
            return self.sessions.disk_view(check_name(name, "a disk"))
        except OSError as error:
            raise from_os_error(error) from None

    def session_list(self) -> SessionList:
        return SessionList(self.sessions.views())

    def session(self, name: str) -> SessionView:
        try:
            return self.sessions.find(check_name(name, "a session"))
        except OSError as error:
            raise from_os_error(error) from None

    # -- changing --------------------------------------------------------------------------

    async def begin(self, name: str, body: bytes) -> tuple[int, BeginAnswer]:
        """Begin a session: 201, or 200 for one that was there."""
        check_name(name, "a session")
        ask = self._ask(decode(body, BeginBody))
        try:
            begun = await self.sessions.begin(name, ask)
        except OSError as error:
            refused = from_os_error(error)
            raise CallError(refused.status, f"cannot begin session {name}: {refused}") from error
        return (201 if begun.is_new else 200), self._answer(begun)

    def _ask(self, body: BeginBody) -> Ask:
        try:
            options = SessionOptions(
                on_cbw_error=body.on_cbw_error,
                cbw_timeout_s=body.cbw_timeout,
                temp_limit=body.temp_limit,
                temp_reserve=(
                    self._places.temp_reserve if body.temp_reserve is UNSET else body.temp_reserve
                ),
                cluster_size=body.cluster_size,
                read_once=body.read_once,
            )
        except ValueError as error:
            raise CallError(422, f"the body is not as it should be: {error}") from None
        bitmap = None
        if body.bitmap is not None:
            # The body's pattern lets "..", and a newline at the end, through.
            check_name(body.bitmap, "a bitmap")
            try:
                bitmap = BitmapRequest(body.bitmap, body.bitmap_mode, body.bitmap_granularity)
            except ValueError as error:
                raise CallError(422, f"the body is not as it should be: {error}") from None
        hooks = self._hooks
        return Ask(
            bitmap=bitmap,
            temp=self._temp(body),
            disks=None if body.disks is None else tuple(body.disks),
            options=options,
            owner=body.owner,
            ttl_s=body.ttl,
            idle_ttl_s=body.idle_ttl,
            # An empty command is none.
            freeze=(hooks.freeze if body.freeze_cmd is UNSET else body.freeze_cmd) or None,
            thaw=(hooks.thaw if body.thaw_cmd is UNSET else body.thaw_cmd) or None,
            hook_timeout_s=(hooks.timeout_s if body.hook_timeout is UNSET else body.hook_timeout),
        )

    def _temp(self, body: BeginBody) -> TempPlace:
        """Where the temp images are to be: what is left out is as the server has it."""
        known = self._places.temp
        temp = known.temp if body.temp is UNSET else body.temp
        # What the server has goes with its own kind only.
        if temp != known.temp:
            known = TempPlace(directory=None if "://" in temp else known.directory)
        try:
            return TempPlace(
                temp,
                known.directory if body.temp_dir is UNSET else body.temp_dir,
                known.preallocated if body.temp_prealloc is UNSET else body.temp_prealloc,
                known.overwrite if body.temp_overwrite is UNSET else body.temp_overwrite,
            )
        except ValueError as error:
            text = f"the body is not as it should be: {error}"
            if body.temp is UNSET:
                text += f" (the server's own temp is {temp}; say another one, too)"
            raise CallError(422, text) from None

    def _answer(self, begun: Begun) -> BeginAnswer:
        session = begun.session
        disks = []
        for fleece in session.fleeces:
            uris = list(self._places.uris(fleece.name))
            disks.append(
                BegunDisk(
                    disk=fleece.disk.name,
                    export=fleece.name,
                    uri=uris[0] if uris else None,
                    uris=uris,
                    size=fleece.size,
                    cluster_size=fleece.cluster_size,
                    bitmap=own_view(fleece.own),
                )
            )
        return BeginAnswer(
            name=session.name,
            id=session.id,
            armed_at=session.armed_at,
            pause_ms=round(session.pause_s * 1000, 3),
            warnings=list(begun.warnings),
            disks=disks,
        )

    async def finish(self, name: str, query: Mapping[str, str]) -> SessionView:
        """End a session; as it was just before. Answered once it is written down."""
        check_name(name, "a session")
        result = query.get("result", "success")
        unknown = [key for key in query if key != "result"]
        if unknown or result not in RESULTS:
            wrong = f"{unknown[0]}=" if unknown else f"result={result}"
            raise CallError(422, f"{wrong[:40]!r} is not understood; result=success or failed is")
        try:
            view = self.sessions.finish(name, failed=result == "failed")
        except OSError as error:
            raise from_os_error(error) from None
        await self.sessions.written()
        return view

    async def set_session(self, name: str, body: bytes) -> SessionView:
        """Change what can be changed while it lives. Answered once it is written down."""
        check_name(name, "a session")
        limit = decode(body, SetBody).temp_limit
        try:
            return await self.sessions.set_temp_limit(name, limit)
        except OSError as error:
            raise from_os_error(error) from error

    async def add_disk(self, name: str, body: bytes) -> DiskView:
        check_name(name, "a disk")
        image = decode(body, AddDiskBody).image
        path = _IMAGE.sub("", image)
        if not (os.path.isabs(path) or _NBD_URI.match(image)) or "\0" in image:
            raise CallError(
                422,
                f"{image!r} is no absolute path and no NBD URI; the server has a folder of its own",
            )
        try:
            return await self.sessions.add_disk(name, image)
        except OSError as error:
            raise from_os_error(error) from error

    async def remove_disk(self, name: str) -> None:
        check_name(name, "a disk")
        try:
            await self.sessions.remove_disk(name)
        except OSError as error:
            raise from_os_error(error) from error

    # -- bitmaps ---------------------------------------------------------------------------

    def bitmap_list(self, disk: str) -> BitmapList:
        return BitmapList(self.disk(disk).bitmaps)

    def bitmap(self, disk: str, name: str) -> BitmapView:
        _check_names(disk, name)
        try:
            return bitmap_view(self.sessions.bitmaps.find(disk, name))
        except OSError as error:
            raise from_os_error(error) from None

    async def add_bitmap(self, disk: str, name: str, body: bytes) -> BitmapView:
        _check_names(disk, name)
        granularity = decode(body, AddBitmapBody).granularity
        try:
            return bitmap_view(await self.sessions.bitmaps.add(disk, name, granularity))
        except OSError as error:
            raise from_os_error(error) from error

    async def clear_bitmap(self, disk: str, name: str) -> BitmapView:
        _check_names(disk, name)
        try:
            return bitmap_view(await self.sessions.bitmaps.clear(disk, name))
        except OSError as error:
            raise from_os_error(error) from error

    async def merge_bitmap(self, disk: str, name: str, body: bytes) -> BitmapView:
        """Merge the body's into that of the call."""
        _check_names(disk, name)
        source = decode(body, MergeBody).source
        try:
            return bitmap_view(await self.sessions.bitmaps.merge(disk, source, name))
        except OSError as error:
            raise from_os_error(error) from error

    async def remove_bitmap(self, disk: str, name: str) -> None:
        _check_names(disk, name)
        try:
            await self.sessions.bitmaps.remove(disk, name)
        except OSError as error:
            raise from_os_error(error) from error


def _check_names(disk: str, bitmap: str) -> None:
    check_name(disk, "a disk")
    check_name(bitmap, "a bitmap")
