"""The event log, and what the relay knows."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, String, Table, UniqueConstraint
from sqlalchemy import text as sql

from octollm.storage.tables.columns import (
    ID,
    NAME,
    ORCHESTRATOR,
    json_type,
    number,
    position,
    tenant,
    time,
)

events = Table(
    "events",
    ORCHESTRATOR,
    Column("row_id", position(), primary_key=True, autoincrement=True),  # the order of insertion
    Column("id", ID, nullable=False, unique=True),
    Column("event_type", String(64), nullable=False),
    Column("channel", String(128), nullable=False),
    tenant(),
    Column("subject", NAME, nullable=False),
    number("version"),
    Column("timestamp", String(40), nullable=False),  # RFC 3339, as on the wire
    Column("source", NAME, nullable=False),
    Column("data", json_type(), nullable=False),
    Column("correlation_id", NAME, nullable=False, server_default=""),
    Column("traceparent", NAME, nullable=False, server_default=""),
    # Given by the relay: the position in the log, and that of the event before it on its channel.
    Column("seq", BigInteger(), nullable=True, unique=True),
    Column("prev", BigInteger(), nullable=True),
    # That inserted it. PostgreSQL fills it in by a default that the migration has; NULL on SQLite.
    Column("transaction_id", BigInteger(), nullable=True),
    UniqueConstraint("tenant", "subject", "version"),
    Index("ix_events_tenant_seq", "tenant", "seq"),
    Index(
        "ix_events_unnumbered",
        "row_id",
        sqlite_where=sql("seq IS NULL"),
        postgresql_where=sql("seq IS NULL"),
    ),
    sqlite_autoincrement=True,
)

subjects = Table(
    "subjects",
    ORCHESTRATOR,
    tenant(primary_key=True),
    Column("subject", NAME, primary_key=True),
    number("version"),  # of its latest event
)

channels = Table(
    "channels",
    ORCHESTRATOR,
    Column("channel", String(128), primary_key=True),
    number("seq"),  # of its latest event
)

relay_state = Table(
    "relay_state",
    ORCHESTRATOR,
    Column("name", String(32), primary_key=True),
    Column("holder", NAME, nullable=False, server_default=""),
    number("fence"),  # rises with each claim; a write under an older one is refused
    time("lease_until"),
    number("numbered"),  # the last seq given
    number("published"),  # the last seq that Redis took
)
