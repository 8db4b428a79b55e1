"""Request and response schema of the memory's own operations: document lists with their opaque cursor, and facts."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from octollm.contracts.operations import DocumentOut
from octollm.errors import OctoError

_MAX_CURSOR = 400


def encode_cursor(created_at: float, last: str) -> str:
    """Return the cursor after the row ``last``, made at ``created_at`` (epoch seconds)."""
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


MAX_NAME = 255
"""Characters of a document's or fact's name, and of a fact's source."""


class DocumentList(msgspec.Struct, frozen=True):
    """A page of documents, newest first. ``cursor`` asks for the next page; ``None`` on the last."""

    documents: tuple[DocumentOut, ...]
    cursor: str | None = None


class FactIn(msgspec.Struct, frozen=True, omit_defaults=True):
    """``PUT /facts/{name}``: any JSON value, and where it is known from."""

    value: msgspec.Raw
    source: Annotated[str, Meta(max_length=MAX_NAME)] = ""


class Fact(msgspec.Struct, frozen=True):
    """A fact. ``version`` rises with each change and is its ETag; times are RFC 3339 in UTC."""

    name: str
    value: Any
    source: str
    version: int
    created_at: str
    updated_at: str
