"""Tables of the memory service (documents, passages, full-text index, facts) and of the monitor (spans)."""

from __future__ import annotations

from sqlalchemy import (
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    column,
    table,
)

from octollm.storage.tables.columns import ID, NAME, NAMING, amount, json_type, number, position, tenant, text, time

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
    Index(None, "tenant", "created_at"),
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
    Column("vector_model", NAME, nullable=False, server_default=""),  # that made it; others do not compare
    text("location"),  # in a file that is no text itself, such as a page
    ForeignKeyConstraint(["tenant", "digest"], ["documents.tenant", "documents.digest"], ondelete="CASCADE"),
    Index(None, "tenant", "digest", "position", unique=True),
    sqlite_autoincrement=True,
)

passages_fts = table("passages_fts", column("rowid", Integer()), column("text"))
"""SQLite's FTS5 index over ``passages.text``, kept by triggers; ``rowid`` is ``passages.id``.

Made by a migration, so it is in no ``MetaData``. Ask it with ``text("passages_fts MATCH :query")`` and order by
``bm25(passages_fts)``, and always join ``passages`` to keep within a tenant.
"""

facts = Table(
    "facts",
    MEMORY,
    tenant(primary_key=True),
    Column("key", NAME, primary_key=True),
    Column("value", json_type(), nullable=False),
    Column("source", NAME, nullable=False, server_default=""),
    number("version", 1),  # rises with each change; its ETag
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
