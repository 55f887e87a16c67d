"""Entries of descriptions that tests begin with."""

from __future__ import annotations

from fleecenbd.server.state.description import (
    BitmapEntry,
    Description,
    DiskEntry,
    FleeceEntry,
    OwnEntry,
    SessionEntry,
    Since,
    TempEntry,
)

DISK = DiskEntry("vda", "/images/vm.raw", "file", 7, 42, 1 << 20, "stamps-1")
BITMAP = BitmapEntry("vda", "chain", "b-1", 65536, "bits-1", Since("old", "s-0", 1.0))
SESSION = SessionEntry(
    "nightly",
    "s-1",
    1764000000.25,
    0.01,
    {"on_cbw_error": "break-snapshot", "cbw_timeout_s": 20.0, "temp_limit": None},
    [
        FleeceEntry(
            "vda",
            4096,
            "fleece-1",
            TempEntry("temp-1", 1 << 20, 4096),
            OwnEntry("chain", "use", "b-1", 65536, since=Since("old", "s-0", 1.0)),
        )
    ],
    owner="job-7",
)
WHOLE = Description("boot-1", [DISK], [BITMAP], [SESSION])
