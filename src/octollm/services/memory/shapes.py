"""What the memory says besides the contracts that other services use: lists of documents, and facts."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from octollm.contracts.operations import DocumentOut

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
