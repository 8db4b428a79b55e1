"""Facts of a tenant: JSON values by subject and name, with validity, confidence, evidence and history.

A fact is a series of versions on a time line. The version with the latest begin before a moment is the one that is
valid then, unless its own end has passed; of two that begin together the newer one counts.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import msgspec
from msgspec import UNSET
from sqlalchemy import ColumnElement, and_, delete, exists, func, literal, or_, select, update

from octollm.clock import format_rfc3339
from octollm.contracts.api import decode_cursor, encode_cursor
from octollm.contracts.memory_operations import (
    Fact,
    FactHistory,
    FactIn,
    FactList,
    FactQuery,
    FactSource,
    FactVersion,
)
from octollm.errors import FieldError, OctoError
from octollm.storage import Database, DatabaseConnection, Transaction, row_to_dict
from octollm.storage.tables import documents, fact_sources, fact_versions

MAX_FACTS = 100_000
"""Facts of one tenant."""
MAX_VERSIONS = 100
"""Versions of one fact; the oldest goes when another is added."""
MAX_SOURCES = 100
"""Sources of one version; a further one raises no evidence."""
SHOWN_SOURCES = 20
MAX_DEPTH = 32
"""Levels of a value."""
MAX_WORDS = 8
"""Words of a search; those after them are left out."""
_MAX_TIME = 253_402_300_799.0
"""The end of the year 9999, the last that RFC 3339 can name."""

FactRow = Mapping[str, Any]
"""A row of ``fact_versions``."""


@dataclass(frozen=True, slots=True)
class FactKey:
    """The address of a fact."""

    tenant: str
    subject: str
    name: str

    @property
    def where(self) -> tuple[ColumnElement[bool], ...]:
        """Return the conditions on its versions."""
        columns = fact_versions.c
        return columns.tenant == self.tenant, columns.subject == self.subject, columns.key == self.name


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who writes, and in which task (empty outside of one): both from the token."""

    principal: str
    task_id: str = ""


@dataclass(frozen=True, slots=True)
class Precondition:
    """``match`` is the ETag that the fact must have, ``*`` for any, empty for none; ``absent``: there must be none."""

    match: str = ""
    absent: bool = False

    def check(self, etag: str) -> None:
        """Raise ``state_conflict`` unless the present ``etag`` (empty: there is no fact) meets it."""
        if self.absent and etag:
            raise OctoError(f"The fact already exists, with the ETag {etag}.", code="state_conflict")
        if self.match and (not etag or self.match not in ("*", etag)):
            raise OctoError(f"The ETag of the fact is {etag or 'none'}, not {self.match}.", code="state_conflict")


def find_valid(versions: Sequence[FactRow], at: float) -> FactRow | None:
    """Return the version that is valid at ``at``, or ``None``."""
    begun = [row for row in versions if row["valid_from"] <= at]
    if not begun:
        return None
    latest = max(begun, key=lambda row: (row["valid_from"], row["version"]))
    return latest if latest["valid_until"] is None or latest["valid_until"] > at else None


def normalize_value(value: object, depth: int = 0) -> object:
    """Return the form in which two values are compared: strings in NFC with single spaces, 1.0 as 1.

    Raises ``ValueError`` for a value that not every database can store: NUL, a number out of range, or more
    levels than :data:`MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"at most {MAX_DEPTH} levels")
    if isinstance(value, str):
        if "\x00" in value:
            raise ValueError("no NUL characters")
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("finite numbers")
        return int(value) if value.is_integer() else value
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("whole numbers of 64 bits")
    if isinstance(value, list):
        return [normalize_value(item, depth + 1) for item in cast("list[object]", value)]
    if isinstance(value, dict):
        return {
            str(normalize_value(name, depth)): normalize_value(item, depth + 1)
            for name, item in cast("dict[str, object]", value).items()
        }
    return value


def digest_value(normal: object) -> str:
    """Return the digest of a normalized value. Members of an object have no order."""
    return hashlib.sha256(msgspec.json.encode(normal, order="sorted")).hexdigest()


def floor_to_milliseconds(seconds: float) -> float:
    """Return a time as RFC 3339 text shows it here, so that a time that was read can be written back."""
    # Rounded first: 67108864.644 times 1000 is a little less than the whole number.
    return math.floor(round(seconds * 1000, 3)) / 1000


def parse_moment(text: str, pointer: str) -> float:
    """Return the epoch seconds of an RFC 3339 time; raise ``invalid_body`` at ``pointer``, or ``invalid_parameter``."""
    try:
        moment = datetime.fromisoformat(text)
        seconds = moment.timestamp() if moment.tzinfo is not None else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if 0 <= seconds <= _MAX_TIME:
        return floor_to_milliseconds(seconds)
    detail = "A time has the form of RFC 3339 with an offset, e.g. 2030-01-02T03:04:05Z."
    if not pointer:
        raise OctoError(detail, code="invalid_parameter")
    raise _invalid(pointer, detail)


def _invalid(pointer: str, detail: str) -> OctoError:
    return OctoError(detail, code="invalid_body", field_errors=(FieldError(pointer, detail),))


@dataclass(frozen=True, slots=True)
class _Statement:
    """A checked :class:`FactIn`."""

    value: object
    normal: object
    digest: str
    valid_from: float | None
    valid_until: float | None


def _check(fact: FactIn) -> _Statement:
    try:
        normal = normalize_value(fact.value)
    except ValueError as error:
        raise _invalid("/value", f"This value cannot be stored: {error}.") from error
    if fact.value is None:
        raise _invalid("/value", "A fact needs a value; DELETE takes it away.")
    if "\x00" in fact.source:
        raise _invalid("/source", "A note has no NUL characters.")
    begin = None if fact.valid_from is None else parse_moment(fact.valid_from, "/valid_from")
    end = None if fact.valid_until is None else parse_moment(fact.valid_until, "/valid_until")
    return _Statement(fact.value, normal, digest_value(normal), begin, end)


class FactStore:
    """The facts of all tenants; every question names the tenant that it is asked for."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def put(
        self, key: FactKey, fact: FactIn, by: Provenance, precondition: Precondition | None = None
    ) -> tuple[Fact, bool]:
        """State a fact; return its version, and whether the fact is new.

        The value that is valid already is confirmed: another source raises its evidence, the same one changes nothing.
        Any other value, or another end, becomes a new version. Raises ``invalid_body`` and ``state_conflict``.
        """
        stated = _check(fact)
        async with self._db.transaction() as tx:
            rows = await lock_fact(tx, key)
            now = floor_to_milliseconds(await tx.now())
            present = find_valid(rows, now)
            (precondition or Precondition()).check(fact_etag(present) if present else "")
            if fact.document is not None:
                await _require_document(tx, key.tenant, fact.document)
            source = {
                "note": fact.source,
                "task_id": by.task_id,
                "document": fact.document or "",
                "sub": by.principal,
            }
            # A clock that was set back must not hide a newer statement behind an older one.
            begin = stated.valid_from
            if begin is None:
                begin = max([now, *(row["valid_from"] for row in rows if row["valid_from"] <= row["created_at"])])
            if stated.valid_until is not None and stated.valid_until <= begin:
                raise _invalid("/valid_until", "The end of the validity is not after its begin.")
            version = max((row["version"] for row in rows), default=0) + 1
            confirmed = find_valid(rows, begin)
            if (
                confirmed is not None
                and confirmed["digest"] == stated.digest
                and confirmed["valid_until"] == stated.valid_until
                and stated.valid_from in (None, confirmed["valid_from"])
            ):
                return _to_fact(await _confirm(tx, confirmed, source, fact.confidence, version, now)), False
            if not rows:
                await _check_room(tx, key.tenant)
            row = {
                "tenant": key.tenant,
                "subject": key.subject,
                "key": key.name,
                "version": version,
                "value": stated.value,
                "digest": stated.digest,
                "words": _words(key, stated.normal),
                "source": fact.source,
                "confidence": fact.confidence,
                "evidence": 1,
                "valid_from": begin,
                "valid_until": stated.valid_until,
                "created_at": now,
                "updated_at": now,
            }
            made = await tx.scalar(tx.insert(fact_versions).values(**row).returning(fact_versions.c.id))
            await tx.execute(
                tx.insert(fact_sources).values(
                    fact_id=made, tenant=key.tenant, confidence=fact.confidence, at=now, **source
                )
            )
            if len(rows) >= MAX_VERSIONS:
                oldest = min((each for each in rows if each is not present), key=lambda each: each["version"])
                await tx.execute(delete(fact_versions).where(fact_versions.c.id == oldest["id"]))
        return _to_fact({**row, "id": made}), not rows

    async def get(self, key: FactKey, at: float | None = None) -> tuple[Fact, float]:
        """Return the version that is valid at ``at`` (default: now), and until when another read finds it.

        Raises ``not_found``.
        """
        async with self._db.read() as conn:
            rows = await _read_versions(conn, key)
            moment = await conn.now() if at is None else at
        row = find_valid(rows, moment)
        if row is None:
            raise _not_found()
        ends = [each["valid_from"] for each in rows if each["valid_from"] > moment]
        ends += [] if row["valid_until"] is None else [row["valid_until"]]
        return _to_fact(row), min(ends, default=math.inf)

    async def history(self, key: FactKey) -> FactHistory:
        """Return all versions, the newest first; raise ``not_found``."""
        async with self._db.read() as conn:
            rows = await _read_versions(conn, key)
            ranked = (
                select(
                    fact_sources,
                    func.row_number()
                    .over(partition_by=fact_sources.c.fact_id, order_by=fact_sources.c.at)
                    .label("position"),
                )
                .where(fact_sources.c.fact_id.in_([row["id"] for row in rows]))
                .subquery()
            )
            sources = await conn.all(
                select(ranked).where(ranked.c.position <= SHOWN_SOURCES).order_by(ranked.c.fact_id, ranked.c.position)
            )
        if not rows:
            raise _not_found()
        by_fact: dict[int, list[FactSource]] = {}
        for source in sources:
            by_fact.setdefault(source["fact_id"], []).append(_to_source(source))
        newest_first = sorted(rows, key=lambda row: -row["version"])
        return FactHistory(tuple(FactVersion(_to_fact(row), tuple(by_fact.get(row["id"], ()))) for row in newest_first))

    async def list(self, tenant: str, query: FactQuery) -> FactList:
        """Return a page of the facts that are valid at a time, newest first. Raises ``invalid_parameter``."""
        columns = fact_versions.c
        wanted = [columns.tenant == tenant, columns.confidence >= query.min_confidence]
        if query.subject is not UNSET:
            wanted.append(columns.subject == query.subject)
        if query.prefix:
            wanted.append(columns.key.startswith(query.prefix, autoescape=True))
        wanted += [columns.words.contains(word, autoescape=True) for word in _search_words(query.q)]
        for column, value in (("task_id", query.task), ("document", query.document)):
            if value:
                wanted.append(columns.id.in_(select(fact_sources.c.fact_id).where(*_source_is(tenant, column, value))))
        if query.cursor:
            wanted.append(columns.id < int(decode_cursor(query.cursor)[0]))
        at = parse_moment(query.at, "") if query.at else None
        async with self._db.read() as conn:
            moment = await conn.now() if at is None else at
            rows = await conn.all(
                select(fact_versions)
                .where(*wanted, *_is_valid(moment))
                .order_by(columns.id.desc())
                .limit(query.limit + 1)
            )
        page = rows[: query.limit]
        following = encode_cursor(page[-1]["id"], "") if len(rows) > query.limit else None
        return FactList(tuple(_to_fact(row_to_dict(row)) for row in page), following)


def _is_valid(at: float) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of :func:`find_valid` in SQL."""
    mine, later = fact_versions.c, fact_versions.alias("later").c
    superseded = exists(
        select(literal(1)).where(
            later.tenant == mine.tenant,
            later.subject == mine.subject,
            later.key == mine.key,
            later.valid_from <= at,
            or_(
                later.valid_from > mine.valid_from,
                and_(later.valid_from == mine.valid_from, later.version > mine.version),
            ),
        )
    )
    return mine.valid_from <= at, or_(mine.valid_until.is_(None), mine.valid_until > at), ~superseded


def _source_is(tenant: str, column: str, value: str) -> tuple[ColumnElement[bool], ...]:
    return fact_sources.c.tenant == tenant, fact_sources.c[column] == value


def _search_words(text: str) -> list[str]:
    words = unicodedata.normalize("NFC", text).replace("\x00", " ").lower().split()
    return list(dict.fromkeys(words))[:MAX_WORDS]


def _words(key: FactKey, normal: object) -> str:
    return f"{key.subject} {key.name} {msgspec.json.encode(normal).decode()}".lower()


async def lock_fact(tx: Transaction, key: FactKey) -> list[FactRow]:
    """Return the versions of a fact, which no other transaction changes until the end of this one."""
    if tx.dialect == "postgresql":
        # There may be no row yet that could be locked.
        name = msgspec.json.encode((key.tenant, key.subject, key.name)).decode()
        await tx.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
    return await _read_versions(tx, key)


async def _read_versions(conn: DatabaseConnection, key: FactKey) -> list[FactRow]:
    query = select(fact_versions).where(*key.where).order_by(fact_versions.c.version).limit(MAX_VERSIONS)
    return [row_to_dict(row) for row in await conn.all(query)]


async def _require_document(tx: Transaction, tenant: str, digest: str) -> None:
    where = (documents.c.tenant == tenant, documents.c.digest == digest)
    # Locked against an erasure at the same time, which would not see this source.
    if await tx.scalar(select(documents.c.digest).where(*where).with_for_update(read=True)) is None:
        raise _invalid("/document", "The memory has no document of that digest.")


async def _check_room(tx: Transaction, tenant: str) -> None:
    one_each = select(fact_versions.c.subject, fact_versions.c.key).where(fact_versions.c.tenant == tenant).distinct()
    if await tx.scalar(select(func.count()).select_from(one_each.limit(MAX_FACTS).subquery())) >= MAX_FACTS:
        raise OctoError(f"The tenant has {MAX_FACTS} facts. Erase some first.", code="state_conflict")


async def _confirm(
    tx: Transaction, row: FactRow, source: Mapping[str, str], confidence: float, version: int, now: float
) -> FactRow:
    """Note a source of a version, and return the version as it is then."""
    known = [row_to_dict(each) for each in await tx.all(_sources_of(row["id"]))]
    same = [each for each in known if all(each[name] == value for name, value in source.items())]
    others = [each["confidence"] for each in known if each not in same]
    if same and same[0]["confidence"] == confidence:
        return row
    if not same and len(known) >= MAX_SOURCES:
        return row
    values = {"fact_id": row["id"], "tenant": row["tenant"], "confidence": confidence, **source}
    await tx.execute(
        tx.insert(fact_sources)
        .values(at=now, **values)
        .on_conflict_do_update(index_elements=list(fact_sources.primary_key), set_={"confidence": confidence})
    )
    changed = {
        "version": version,
        "confidence": max([confidence, *others]),
        "evidence": len(others) + 1,
        "updated_at": now,
    }
    await tx.execute(update(fact_versions).where(fact_versions.c.id == row["id"]).values(**changed))
    return {**row, **changed}


def _sources_of(fact_id: int) -> Any:
    return select(fact_sources).where(fact_sources.c.fact_id == fact_id).order_by(fact_sources.c.at).limit(MAX_SOURCES)


def fact_etag(row: Mapping[str, Any]) -> str:
    """Return the ETag of a version (RFC 9110 section 8.8.3)."""
    # The id never names another version, also after the fact was erased and set anew.
    return f'"{row["id"]}-{row["version"]}"'


def _to_fact(row: FactRow) -> Fact:
    return Fact(
        name=row["key"],
        value=row["value"],
        source=row["source"],
        version=row["version"],
        created_at=format_rfc3339(row["created_at"]),
        updated_at=format_rfc3339(row["updated_at"]),
        subject=row["subject"],
        confidence=row["confidence"],
        evidence=row["evidence"],
        valid_from=format_rfc3339(row["valid_from"]),
        valid_until=None if row["valid_until"] is None else format_rfc3339(row["valid_until"]),
        etag=fact_etag(row),
    )


def _to_source(row: Mapping[Any, Any]) -> FactSource:
    at = format_rfc3339(row["at"])
    return FactSource(row["sub"], at, row["confidence"], row["note"], row["task_id"], row["document"])


def _not_found() -> OctoError:
    return OctoError("There is no fact of that name that is valid at that time.", code="not_found")
