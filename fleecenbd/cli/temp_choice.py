"""--temp, --temp-dir, --temp-prealloc and --temp-overwrite, checked."""

from __future__ import annotations

import os
import re
from typing import Any

from fleecenbd.cli.errors import UsageError
from fleecenbd.server.temp_place import RAW, TempPlace


def temp_fields(
    temp: str | None, directory: str | None, *, preallocated: bool, overwrite: bool
) -> dict[str, Any]:
    """What was given, as fields of the body of ``PUT /v1/sessions/NAME``. Raises UsageError."""
    fields: dict[str, Any] = {}
    if temp is not None:
        fields["temp"] = temp
    if directory is not None:
        if not directory:
            raise UsageError("--temp-dir: '' names nothing; leave the option out, or give a folder")
        fields["temp_dir"] = os.path.abspath(directory)
    if preallocated:
        fields["temp_prealloc"] = True
    if overwrite:
        fields["temp_overwrite"] = True
    if temp is not None:
        _place(temp, fields.get("temp_dir"), preallocated=preallocated, overwrite=overwrite)
    return fields


def choose_temp_place(
    temp: str | None, directory: str | None, *, preallocated: bool, overwrite: bool
) -> TempPlace:
    """What all of a server's sessions have that do not say otherwise. Raises UsageError."""
    fields = temp_fields(temp, directory, preallocated=preallocated, overwrite=overwrite)
    return _place(
        fields.get("temp", RAW),
        fields.get("temp_dir"),
        preallocated=preallocated,
        overwrite=overwrite,
    )


def _place(temp: str, directory: str | None, *, preallocated: bool, overwrite: bool) -> TempPlace:
    try:
        return TempPlace(temp, directory, preallocated, overwrite)
    except ValueError as error:
        option, _, rest = str(error).partition(" ")
        # The words of the API as those of the command line.
        rest = re.sub(r"\btemp is an NBD URI$", "--temp is an NBD URI", rest)
        raise UsageError(f"--{option.replace('_', '-')} {rest}") from None
