"""Which file names may enter a work folder."""

from __future__ import annotations

import re
from collections.abc import Mapping

from octollm.errors import OctoError

MAX_NAME = 200
"""Bytes of a whole relative name."""
MAX_DEPTH = 8
"""Parts of a relative name."""
MAX_JOB_FILES = 64
MAX_JOB_BYTES = 128 * 1024 * 1024
"""All files of a job together."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


def find_name_fault(name: str) -> str:
    """Say what is wrong with a relative file name, or return the empty string."""
    if not name:
        return "a file needs a name"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "the name is not Unicode text"
    if size > MAX_NAME:
        return f"the name is longer than {MAX_NAME} bytes"
    if _CONTROL.search(name):
        return "the name has a control character or a backslash"
    if name.startswith("/"):
        return "the name is not relative"
    parts = name.split("/")
    if len(parts) > MAX_DEPTH:
        return f"the name has more than {MAX_DEPTH} parts"
    if any(part in ("", ".", "..") for part in parts):
        return "the name has an empty part, '.' or '..'"
    return ""


def check_names(files: Mapping[str, bytes]) -> None:
    """Raise ``OctoError`` (``file_invalid``) unless ``files`` may enter a work folder together."""
    if len(files) > MAX_JOB_FILES:
        raise OctoError(f"a run takes at most {MAX_JOB_FILES} files", code="file_invalid")
    if sum(map(len, files.values())) > MAX_JOB_BYTES:
        raise OctoError(f"a run takes at most {MAX_JOB_BYTES} bytes of files", code="file_invalid")
    for name in files:
        fault = find_name_fault(name)
        if fault:
            raise OctoError(f"file {name[:MAX_NAME]!r}: {fault}", code="file_invalid")
    for name in files:
        parts = name.split("/")
        for end in range(1, len(parts)):
            folder = "/".join(parts[:end])
            if folder in files:
                raise OctoError(f"{folder!r} is both a file and a folder", code="file_invalid")
