"""The monitor's own table: spans as they came."""

from __future__ import annotations

from sqlalchemy import Column, Index, MetaData, String, Table, UniqueConstraint

from octollm.storage.tables.columns import ID, NAME, NAMING, amount, json_type, position, tenant, text, time

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
