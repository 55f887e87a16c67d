"""The sessions that most scenarios have."""

from __future__ import annotations

from ..scenario import BACKUP_FIRST, Session

TEMP = "temp vda@s"
TEMP_HANGS = ((TEMP, "write"),)
BACKUPS_FIRST = (Session(policy=BACKUP_FIRST),)
TIMED = (Session(timeout_s=1.0),)
TIMED_BACKUPS_FIRST = (Session(policy=BACKUP_FIRST, timeout_s=1.0),)
