"""The opaque cursor of a list: where the page before it ended."""

from __future__ import annotations

import base64
import binascii

import msgspec

from octollm.errors import OctoError

_MAX_CURSOR = 400


def encode_cursor(created_at: float, last: str) -> str:
    """Return the cursor after the row ``last``, made at ``at`` (epoch seconds)."""
    return base64.urlsafe_b64encode(msgspec.json.encode([created_at, last])).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[float, str]:
    """Return what :func:`encode_cursor` was given; raise ``invalid_parameter`` for any other text."""
    refused = OctoError("The cursor is not one that a list gave.", code="invalid_parameter")
    if len(cursor) > _MAX_CURSOR:
        raise refused
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        return msgspec.json.decode(base64.urlsafe_b64decode(padded), type=tuple[float, str])
    except (msgspec.DecodeError, binascii.Error, ValueError) as error:
        raise refused from error
