"""The bodies of the calls: what clients may send, and what they are sent. Unknown fields are
refused, so that an option which was misspelt is not silently left out.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fleecenbd.engine.recording import (
    GRANULARITY_DEFAULT,
    GRANULARITY_MAX,
    GRANULARITY_MIN,
)
from fleecenbd.engine.session import CLUSTER_SIZE_MAX, SessionOptions
from fleecenbd.engine.state import CLUSTER_SIZE_MIN
from fleecenbd.server.hooks import HOOK_TIMEOUT_S
from fleecenbd.server.job_asks import TARGET_LENGTH_MAX
from fleecenbd.server.names import NAME_LENGTH_MAX
from fleecenbd.server.views import BitmapView, DiskView, JobView, OwnBitmapView, SessionView

Seconds = Annotated[float, Meta(ge=0, le=1e9)]
TimeToLive = Annotated[float, Meta(gt=0, le=1e9)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=NAME_LENGTH_MAX, pattern=r"^[A-Za-z0-9._-]+$")]
Granularity = Annotated[int, Meta(ge=GRANULARITY_MIN, le=GRANULARITY_MAX)]
Requests = Annotated[int, Meta(ge=1, le=1024)]
Rate = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Command = Annotated[str, Meta(max_length=4096)]


class BeginBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How to begin a session. Sizes in bytes, times in seconds."""

    disks: Annotated[
        list[Name] | None, Meta(description="the disks it is over; null: all of them")
    ] = None
    on_cbw_error: Annotated[
        Literal["break-snapshot", "break-guest-write", "throttle"],
        Meta(
            description="what gives way when old data cannot be kept; throttle: as break-snapshot, "
            "and guest writes are delayed before"
        ),
    ] = "break-snapshot"
    cbw_timeout: Annotated[
        Seconds, Meta(description="how long a guest write may wait for old data; 0: for ever")
    ] = SessionOptions.cbw_timeout_s
    temp_limit: Annotated[
        Count | None, Meta(description="bytes of old data kept, for each disk; null: no limit")
    ] = None
    temp_reserve: Annotated[
        Count | UnsetType | None,
        Meta(
            description="bytes that the temp images' file system keeps free; left out: as the "
            "server has it; null: 5 % of it, 1 GiB at least; 0: none"
        ),
    ] = UNSET
    cluster_size: Annotated[
        Annotated[int, Meta(ge=CLUSTER_SIZE_MIN, le=CLUSTER_SIZE_MAX)] | None,
        Meta(description="a power of two; null: the smallest that keeps a bitmap small"),
    ] = None
    temp: Annotated[
        Annotated[str, Meta(min_length=1, max_length=4096)] | UnsetType,
        Meta(
            description="what temp images are: raw, qcow2, or the NBD URI of an export, in which "
            "{disk} and {session} stand for their names; left out: as the server has it"
        ),
    ] = UNSET
    temp_dir: Annotated[
        Annotated[str, Meta(min_length=1, max_length=4096)] | UnsetType | None,
        Meta(
            description="absolute path of a folder for their files; left out: as the server has "
            "it; null: the server's own"
        ),
    ] = UNSET
    temp_prealloc: Annotated[
        bool | UnsetType,
        Meta(description="take all of a raw temp image's space now; left out: as the server does"),
    ] = UNSET
    temp_overwrite: Annotated[
        bool | UnsetType,
        Meta(
            description="the export at the NBD URI may hold data, which goes; left out: as the "
            "server has it"
        ),
    ] = UNSET
    read_once: Annotated[
        bool,
        Meta(
            description="whatever its exports have handed over is released: each part of a disk "
            "can be read once, in whole clusters; for clients that send no TRIM, and never retry"
        ),
    ] = False
    ttl: Annotated[
        TimeToLive | None, Meta(description="seconds from arming to its end, as failed")
    ] = None
    idle_ttl: Annotated[
        TimeToLive | None, Meta(description="seconds from the last request to its end, as failed")
    ] = None
    bitmap: Annotated[
        Name | None, Meta(description="a recording bitmap of each disk; null: none")
    ] = None
    bitmap_mode: Annotated[
        Literal["use", "new", "use-or-new", "keep"],
        Meta(description="what the exports read, and what becomes of the bitmap"),
    ] = "use-or-new"
    bitmap_granularity: Annotated[
        Granularity, Meta(description="bytes, of a bitmap that has to be made")
    ] = GRANULARITY_DEFAULT
    owner: Annotated[
        Annotated[str, Meta(min_length=1, max_length=200)] | None,
        Meta(
            description="a word of the caller's own: with it, and the same options, asking "
            "again gets the same session"
        ),
    ] = None
    freeze_cmd: Annotated[
        Command | UnsetType | None,
        Meta(description="shell command before arming; left out: the server's; null: none"),
    ] = UNSET
    thaw_cmd: Annotated[
        Command | UnsetType | None,
        Meta(description="shell command after arming, always; left out: the server's; null: none"),
    ] = UNSET
    hook_timeout: Annotated[
        TimeToLive | UnsetType,
        Meta(
            description="seconds after which a hook is killed; left out: the server's, "
            f"{HOOK_TIMEOUT_S:g} by default"
        ),
    ] = UNSET


class AddDiskBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A disk to serve."""

    image: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=4096,
            description="absolute path of a raw file or a block device; raw:PATH, qcow2:PATH or "
            "an NBD URI as on the command line",
        ),
    ]


class AddBitmapBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A bitmap that records from now on."""

    granularity: Annotated[
        Granularity, Meta(description="bytes of the disk for each bit, a power of two")
    ] = GRANULARITY_DEFAULT


class MergeBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which bitmap is merged into that of the call; of the same disk."""

    source: Name


class JobBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A backup that the server makes; sizes in bytes. What is left out is as in fleecenbd pull."""

    session: Name
    disk: Name
    target: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=TARGET_LENGTH_MAX,
            description="an absolute path, as the server sees it, raw:PATH, qcow2:PATH, or an NBD "
            "URI",
        ),
    ]
    finish: Annotated[
        bool,
        Meta(
            description="finish the session: as failed if this job fails or is cancelled, as "
            "success once each of its disks has a job that is complete"
        ),
    ] = False
    force: Annotated[bool, Meta(description="write over what is there")] = False
    resume: Annotated[bool, Meta(description="go on with what was kept")] = False
    trim: Annotated[bool, Meta(description="release what is durable in the target")] = True
    read_once: Annotated[bool, Meta(description="release by reading")] = False
    verify: Annotated[bool, Meta(description="read the target back at the end")] = False
    compress: Annotated[bool, Meta(description="the clusters of a qcow2: target")] = False
    checksum: Annotated[
        Annotated[str, Meta(max_length=32)] | None,
        Meta(description="an algorithm: blake2b, sha256 and others; null: none"),
    ] = None
    bitmap: Annotated[
        Name | None, Meta(description="copy what is dirty in this bitmap of the session")
    ] = None
    rate: Annotated[Rate | None, Meta(description="bytes read per second; null: no limit")] = None
    connections: Annotated[int, Meta(ge=1, le=16)] | None = None
    requests: Annotated[Requests | None, Meta(description="READs in flight")] = None
    retries: Annotated[
        Annotated[int, Meta(ge=0, le=1024)] | None,
        Meta(description="how often in a row a dropped connection is made anew"),
    ] = None
    journal: Annotated[
        Annotated[str, Meta(min_length=1, max_length=TARGET_LENGTH_MAX)] | None,
        Meta(description="absolute path; null: beside a file, else in the state directory"),
    ] = None
    keep: Annotated[
        bool, Meta(description="what is durable stays for resume where it fails; not with finish")
    ] = True
    backing: Annotated[
        Annotated[str, Meta(min_length=1, max_length=TARGET_LENGTH_MAX)] | None,
        Meta(description="the backing file of a qcow2: target, seen from the target's folder"),
    ] = None
    backing_format: Literal["raw", "qcow2"] | None = None


class RateBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A limit for a job that runs."""

    rate: Annotated[Rate | None, Meta(description="bytes read per second; null: no limit")]


class SetBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What is changed of a session that goes on."""

    temp_limit: Annotated[
        Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None,
        Meta(description="bytes, for the temp image of each disk; null: no limit"),
    ]


class CancelBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How a job is ended."""

    keep: Annotated[
        bool,
        Meta(description="what is durable stays for resume, though the job was begun without keep"),
    ] = False


class BegunDisk(msgspec.Struct, frozen=True):
    """One disk of a session that has begun."""

    disk: str
    export: str
    uri: Annotated[str | None, Meta(description="the first of uris; null where there is none")]
    uris: list[str]
    size: int
    cluster_size: int
    bitmap: OwnBitmapView | None


class BeginAnswer(msgspec.Struct, frozen=True):
    """A session that has begun."""

    name: str
    id: str
    armed_at: Annotated[float, Meta(description="seconds since the epoch")]
    pause_ms: Annotated[float, Meta(description="how long guest writes were held")]
    warnings: list[str]
    disks: list[BegunDisk]


class Disks(msgspec.Struct, frozen=True):
    disks: list[DiskView]


class BitmapList(msgspec.Struct, frozen=True):
    bitmaps: list[BitmapView]


class SessionList(msgspec.Struct, frozen=True):
    sessions: Annotated[
        list[SessionView], Meta(description="the last 20 finished ones first, oldest first")
    ]


class JobList(msgspec.Struct, frozen=True):
    jobs: Annotated[
        list[JobView], Meta(description="the last 20 that have ended first, oldest first")
    ]


class Status(msgspec.Struct, frozen=True):
    """Everything at one moment."""

    version: str
    pid: int
    disks: list[DiskView]
    sessions: list[SessionView]
    jobs: list[JobView]


class Error(msgspec.Struct, frozen=True):
    """Why a call failed."""

    error: str
