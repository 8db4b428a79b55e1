"""Tables of the memory service (documents, passages, full-text index, facts) and of the monitor (spans)."""

from __future__ import annotations

from sqlalchemy import (
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    column,
    table,
)

from octollm.storage.tables.columns import (
    ID,
    NAME,
    NAMING,
    amount,
    json_type,
    number,
    position,
    share,
    tenant,
    text,
    time,
)

MEMORY = MetaData(naming_convention=NAMING)

documents = Table(
    "documents",
    MEMORY,
    tenant(primary_key=True),
    Column("digest", ID, primary_key=True),  # SHA-256 of the bytes it came from, lower-case hex
    text("name"),
    Column("lines", Integer(), nullable=False, server_default="0"),
    Column("passages", Integer(), nullable=False, server_default="0"),
    time("created_at"),
    Column("language", String(8), nullable=False, server_default=""),  # ISO 639-1; empty while it is unknown
    Column("media_type", NAME, nullable=False, server_default=""),
    Column("embedded", Integer(), nullable=False, server_default="0"),  # of its passages, those with a vector
    Index(None, "tenant", "created_at"),
    Index(None, "tenant", "language"),
)

passages = Table(
    "passages",
    MEMORY,
    Column("id", position(), primary_key=True, autoincrement=True),
    tenant(),
    Column("digest", ID, nullable=False),
    Column("position", Integer(), nullable=False),  # in its document, from 0
    Column("line_start", Integer(), nullable=False),  # 1-based, both included
    Column("line_end", Integer(), nullable=False),
    text("text"),
    Column("vector", LargeBinary(), nullable=True),  # little-endian float32, of unit length
    Column("vector_model", NAME, nullable=False, server_default=""),  # that made it; empty without a vector
    text("location"),  # in a file that is no text itself, such as a page
    text("terms"),  # for full text, parted by blanks; each begins with its tenant's prefix
    Column("terms_version", Integer(), nullable=False, server_default="0"),  # of the rules that made them
    # When the vector was written; without one, until when a replica is at work on it.
    Column("embedded_at", Double[float](), nullable=False, server_default="0"),
    ForeignKeyConstraint(["tenant", "digest"], ["documents.tenant", "documents.digest"], ondelete="CASCADE"),
    Index(None, "tenant", "digest", "position", unique=True),
    Index(None, "terms_version"),
    Index(None, "vector_model", "position", "id"),
    Index(None, "tenant", "embedded_at"),
    sqlite_autoincrement=True,
)

passage_terms = table("passage_terms", column("rowid", Integer()))
"""SQLite's FTS5 index over ``passages.terms``, kept by triggers; ``rowid`` is ``passages.id``.

Made by a migration, as ``passage_vocabulary`` (how many passages have a term) and PostgreSQL's ``passages.term_vector``
are, so it is in no ``MetaData``. Ask it with ``text("passage_terms MATCH :query")``. A term's prefix keeps the tenants
apart, and a join with ``passages`` makes sure of it.
"""
passage_vocabulary = table("passage_vocabulary", column("term", Text()), column("doc", Integer()))

fact_versions = Table(
    "fact_versions",
    MEMORY,
    Column("id", position(), primary_key=True, autoincrement=True),
    tenant(),
    Column("subject", NAME, nullable=False, server_default=""),  # what the fact is about, in any words
    Column("key", NAME, nullable=False),
    number("version", 1),  # rises with each change of the fact
    Column("value", json_type(), nullable=False),
    Column("digest", ID, nullable=False),  # of the normalized value: two of one digest say the same
    text("words"),  # what is searched: lower-case subject, name and value
    Column("source", NAME, nullable=False, server_default=""),  # the note of its first source
    share("confidence"),  # the highest of its sources
    number("evidence", 1),  # how many sources it has
    time("valid_from"),
    time("valid_until", nullable=True),
    time("created_at"),
    time("updated_at"),
    Index(None, "tenant", "subject", "key", "version", unique=True),
    Index(None, "tenant", "subject", "key", "valid_from"),
    sqlite_autoincrement=True,
)

fact_sources = Table(
    "fact_sources",
    MEMORY,
    Column("fact_id", position(), ForeignKey("fact_versions.id", ondelete="CASCADE"), primary_key=True),
    tenant(),
    Column("note", NAME, primary_key=True, server_default=""),
    Column("task_id", String(128), primary_key=True, server_default=""),
    Column("document", ID, primary_key=True, server_default=""),
    Column("sub", NAME, primary_key=True, server_default=""),  # the principal
    share("confidence"),
    time("at"),
    Index(None, "tenant", "task_id"),
    Index(None, "tenant", "document"),
)

document_sources = Table(
    "document_sources",
    MEMORY,
    tenant(primary_key=True),
    Column("digest", ID, primary_key=True),
    Column("task_id", String(128), primary_key=True, server_default=""),  # empty outside of a task
    Column("sub", NAME, primary_key=True, server_default=""),
    time("at"),
    ForeignKeyConstraint(["tenant", "digest"], ["documents.tenant", "documents.digest"], ondelete="CASCADE"),
    Index(None, "tenant", "task_id"),
)

Table(
    # Emptied by the revision that made `fact_versions`; it is there for replicas of the version before.
    "facts",
    MEMORY,
    tenant(primary_key=True),
    Column("key", NAME, primary_key=True),
    Column("value", json_type(), nullable=False),
    Column("source", NAME, nullable=False, server_default=""),
    number("version", 1),
    time("created_at"),
    time("updated_at"),
    Index(None, "tenant", "updated_at"),
)


MONITOR = MetaData(naming_convention=NAMING)

spans = Table(
    "spans",
    MONITOR,
    Column("id", position(), primary_key=True, autoincrement=True),  # the order of arrival
    tenant(),  # empty for a call that a service made or served in its own name
    Column("task_id", ID, nullable=False, server_default=""),
    Column("trace_id", ID, nullable=False),
    Column("span_id", ID, nullable=False),
    Column("parent_id", ID, nullable=False, server_default=""),
    Column("service", NAME, nullable=False),  # who sent it, by its own key
    Column("name", NAME, nullable=False),
    Column("kind", String(16), nullable=False),
    time("started_at"),
    amount("duration_ms"),
    Column("code", NAME, nullable=False, server_default=""),
    text("message"),
    Column("attributes", json_type(), nullable=False),
    time("received_at"),
    UniqueConstraint("service", "trace_id", "span_id"),
    Index(None, "tenant", "task_id"),
    Index(None, "trace_id"),
    Index(None, "received_at"),
    sqlite_autoincrement=True,
)
