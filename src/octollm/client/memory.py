"""AsyncMemory: facts, documents, search and erasure in the memory of the tenant."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable
from datetime import datetime

from octollm.client._transport import TRANSFER_TIMEOUT_SECONDS, GatewayTransport
from octollm.contracts.memory_operations import (
    ERASE_DOCUMENT,
    ERASE_FACT,
    ERASE_MEMORY,
    ERASE_TASK,
    GET_FACT,
    LIST_DOCUMENTS,
    LIST_FACTS,
    PUT_FACT,
    READ_DOCUMENT,
    READ_FACT_HISTORY,
    SEARCH_MEMORY,
    STORE_DOCUMENT,
    Erasure,
    Fact,
    FactVersion,
)
from octollm.contracts.operations import DocumentIn, DocumentOut, Passage, SearchFilters, SearchRequest

_PAGE = 200
Moment = datetime | str
"""A time with a UTC offset; as text in the form of RFC 3339."""


class AsyncMemory:
    """The tenant's memory, as ``client.memory``. Every method raises :class:`~octollm.client.APIError`.

    A fact is found by its ``name`` (``a-z``, ``0-9``, ``.``, ``_``, ``-``) and the ``subject`` that it is about, which
    may be any text; without one it is about the tenant itself.
    """

    def __init__(self, transport: GatewayTransport) -> None:
        self._transport = transport

    async def put_fact(
        self,
        name: str,
        value: object,
        *,
        subject: str = "",
        confidence: float = 1.0,
        source: str = "",
        document: str | None = None,
        valid_from: Moment | None = None,
        valid_until: Moment | None = None,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> Fact:
        """State a fact: any JSON value but null, with a ``confidence`` from 0 to 1.

        A new value supersedes the old one from ``valid_from`` (default: now) on; the same value from another source
        raises its evidence. ``if_match`` is the ``etag`` of the fact that may be changed, ``if_absent`` wants that
        there is none: :class:`Conflict` is raised otherwise. ``document`` is the digest of a stored document.
        """
        body = {
            "value": value,
            "confidence": confidence,
            "source": source,
            "document": document,
            "valid_from": _format(valid_from),
            "valid_until": _format(valid_until),
        }
        headers: dict[str, str] = {}
        if if_match is not None:
            headers["If-Match"] = if_match
        if if_absent:
            headers["If-None-Match"] = "*"
        sent = {name: each for name, each in body.items() if each is not None or name == "value"}
        return await self._transport.call(PUT_FACT, sent, query={"subject": subject}, headers=headers, name=name)

    async def fact(self, name: str, *, subject: str = "", at: Moment | None = None) -> Fact:
        """Return the fact that is valid ``at`` a time (default: now); raise :class:`NotFound` without one."""
        return await self._transport.call(GET_FACT, query={"subject": subject, "at": _format(at)}, name=name)

    async def fact_history(self, name: str, *, subject: str = "") -> tuple[FactVersion, ...]:
        """Return the versions of a fact with their sources, the newest first."""
        return (await self._transport.call(READ_FACT_HISTORY, query={"subject": subject}, name=name)).versions

    async def facts(
        self,
        words: str = "",
        *,
        subject: str | None = None,
        prefix: str = "",
        min_confidence: float = 0.0,
        task: str = "",
        document: str = "",
        at: Moment | None = None,
    ) -> AsyncGenerator[Fact]:
        """Yield the facts that are valid ``at`` a time (default: now), the newest first, fetched page by page.

        ``words`` must all occur in subject, name or value. ``prefix`` is the beginning of the name; ``task`` and
        ``document`` are sources.
        """
        query: dict[str, object] = {
            "q": words,
            "subject": subject,
            "prefix": prefix,
            "min_confidence": min_confidence,
            "task": task,
            "document": document,
            "at": _format(at),
            "limit": _PAGE,
        }
        while True:
            page = await self._transport.call(LIST_FACTS, query=query)
            for fact in page.facts:
                yield fact
            if page.cursor is None:
                return
            query["cursor"] = page.cursor

    async def erase_fact(self, name: str, *, subject: str = "", if_match: str | None = None) -> Erasure:
        """Erase a fact with its history; raise :class:`NotFound` without one."""
        headers = None if if_match is None else {"If-Match": if_match}
        return await self._transport.call(ERASE_FACT, query={"subject": subject}, headers=headers, name=name)

    async def store_document(self, name: str, text: str) -> DocumentOut:
        """Store a text that :meth:`search` finds; the same text is stored once."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        return await self._transport.call(
            STORE_DOCUMENT, DocumentIn(name, text, digest), timeout=TRANSFER_TIMEOUT_SECONDS
        )

    async def document(self, digest: str) -> DocumentOut:
        """Describe a document; raise :class:`NotFound` without one."""
        return await self._transport.call(READ_DOCUMENT, digest=digest)

    async def documents(self) -> AsyncGenerator[DocumentOut]:
        """Yield the documents, the newest first, fetched page by page."""
        cursor = None
        while True:
            page = await self._transport.call(LIST_DOCUMENTS, query={"limit": _PAGE, "cursor": cursor})
            for document in page.documents:
                yield document
            cursor = page.cursor
            if cursor is None:
                return

    async def search(self, query: str, *, limit: int = 5, documents: Iterable[str] = ()) -> tuple[Passage, ...]:
        """Return up to ``limit`` (1 to 50) passages, the best first; ``documents`` are digests to search in."""
        request = SearchRequest(query, limit, SearchFilters(tuple(documents)))
        return (await self._transport.call(SEARCH_MEMORY, request)).passages

    async def erase_document(self, digest: str) -> Erasure:
        """Erase a document, and the facts known from it alone; raise :class:`NotFound` without one."""
        return await self._transport.call(ERASE_DOCUMENT, digest=digest)

    async def erase_task(self, task_id: str) -> Erasure:
        """Erase the documents and facts known from a task alone; raise :class:`NotFound` where there are none."""
        return await self._transport.call(ERASE_TASK, task_id=task_id)

    async def erase_all(self) -> Erasure:
        """Erase all documents and facts of the tenant."""
        return await self._transport.call(ERASE_MEMORY, timeout=TRANSFER_TIMEOUT_SECONDS)


def _format(moment: Moment | None) -> str | None:
    return moment.isoformat() if isinstance(moment, datetime) else moment
