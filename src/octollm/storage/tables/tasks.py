"""Tables of work: tasks, steps, files, budgets and reservations, idempotency, the model journal, and the event log."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy import text as sql

from octollm.storage.tables.columns import (
    ID,
    NAME,
    ORCHESTRATOR,
    amount,
    json_type,
    number,
    position,
    tenant,
    text,
    time,
)

tasks = Table(
    "tasks",
    ORCHESTRATOR,
    Column("task_id", ID, primary_key=True),
    tenant(),
    Column("kind", String(16), nullable=False, server_default="task"),  # task, or adhoc for a minted token
    # Who it is for, and what they may do: scopes separated by spaces.
    Column("sub", NAME, nullable=False),
    Column("cred", NAME, nullable=False, server_default=""),
    text("authority"),
    # What was asked.
    text("goal"),
    Column("contract", json_type(), nullable=False),
    Column("priority", Integer(), nullable=False, server_default="0"),
    Column("forked_from", ID, nullable=True),
    Column("parent_task_id", ID, nullable=True),
    Column("correlation_id", NAME, nullable=False, server_default=""),
    Column("traceparent", NAME, nullable=False, server_default=""),
    # Where it stands. version is that of its latest event; progress is from 0 to 100 and only rises.
    Column("status", String(16), nullable=False),
    amount("progress"),
    number("version"),
    text("waiting_for", nullable=True),
    Column("plan", json_type(), nullable=True),
    # Who works on it: run is the fence, which rises with each claim.
    number("run"),
    Column("lease_holder", NAME, nullable=True),
    time("lease_until", nullable=True),
    # How it ended.
    text("output", nullable=True),
    Column("result", json_type(), nullable=True),
    Column("error", json_type(), nullable=True),
    time("created_at"),
    time("updated_at"),
    time("started_at", nullable=True),
    time("finished_at", nullable=True),
    time("deadline_at", nullable=True),
    Index(None, "tenant", "created_at", "task_id"),
    Index(None, "tenant", "sub"),
    Index(None, "status", "lease_until"),
)

steps = Table(
    "steps",
    ORCHESTRATOR,
    Column("task_id", ID, ForeignKey(tasks.c.task_id, ondelete="CASCADE"), primary_key=True),
    Column("step", NAME, primary_key=True),
    Column("position", Integer(), nullable=False, server_default="0"),  # in its plan
    Column("plan_number", Integer(), nullable=False, server_default="1"),  # 2 after a replan
    Column("arm", NAME, nullable=False),
    text("title"),
    Column("status", String(16), nullable=False, server_default="pending"),
    Column("attempt", Integer(), nullable=False, server_default="0"),
    Column("run", Integer(), nullable=False, server_default="0"),  # that wrote the text
    Column("spec", json_type(), nullable=False),
    Column("result", json_type(), nullable=True),
    Column("reasons", json_type(), nullable=True),
    text("text"),
    Column("text_base", Integer(), nullable=False, server_default="0"),  # offset of its first code point
    time("created_at"),
    time("updated_at"),
    time("started_at", nullable=True),
    time("finished_at", nullable=True),
)

files = Table(
    "files",
    ORCHESTRATOR,
    tenant(primary_key=True),
    Column("digest", ID, primary_key=True),  # SHA-256, lower-case hex
    text("name"),
    number("size"),
    Column("media_type", NAME, nullable=False, server_default="application/octet-stream"),
    Column("body", LargeBinary(), nullable=False),
    time("created_at"),
    Index(None, "tenant", "created_at"),
)

task_files = Table(
    "task_files",
    ORCHESTRATOR,
    Column("task_id", ID, ForeignKey(tasks.c.task_id, ondelete="CASCADE"), primary_key=True),
    Column("role", String(16), primary_key=True),  # input or artifact
    Column("step", NAME, primary_key=True, server_default=""),  # that made it; empty for an input
    Column("name", Text(), primary_key=True),
    Column("digest", ID, nullable=False),
    time("created_at"),
    Index(None, "digest"),
)


idempotency = Table(
    "idempotency",
    ORCHESTRATOR,
    tenant(primary_key=True),
    Column("subject", NAME, primary_key=True),  # the principal the call is for
    Column("service", NAME, primary_key=True),
    Column("operation", NAME, primary_key=True),
    Column("key", NAME, primary_key=True),
    Column("body_digest", ID, nullable=False),
    Column("state", String(16), nullable=False),  # claimed, completed, unknown
    Column("task_id", ID, nullable=True),
    number("run"),
    Column("holder", NAME, nullable=False, server_default=""),
    number("fence"),  # rises with each claim, so that a holder thought dead cannot complete
    time("lease_until"),
    Column("status", Integer(), nullable=True),
    Column("answer", LargeBinary(), nullable=True),
    Column("headers", json_type(), nullable=True),
    time("created_at"),
    time("completed_at", nullable=True),
    Index(None, "created_at"),
    Index(None, "task_id"),
)

budgets = Table(
    "budgets",
    ORCHESTRATOR,
    Column("task_id", ID, ForeignKey(tasks.c.task_id, ondelete="CASCADE"), primary_key=True),
    Column("max_tokens", BigInteger(), nullable=True),
    amount("max_cost_usd", nullable=True),
    number("reserved_tokens"),  # of open reservations
    amount("reserved_cost_usd"),
    number("used_tokens"),  # settled
    amount("used_cost_usd"),
    number("prompt_tokens"),
    number("completion_tokens"),
)

reservations = Table(
    "reservations",
    ORCHESTRATOR,
    Column("id", ID, primary_key=True),
    Column("task_id", ID, ForeignKey(tasks.c.task_id, ondelete="CASCADE"), nullable=False),
    Column("step", NAME, nullable=False, server_default=""),
    Column("attempt", Integer(), nullable=False, server_default="0"),
    number("run"),
    Column("key", NAME, nullable=False),  # the nested key of the model call
    Column("model", NAME, nullable=False, server_default=""),
    number("tokens"),
    amount("cost_usd"),
    Column("state", String(16), nullable=False, server_default="open"),  # open, settled, released
    number("used_tokens"),
    amount("used_cost_usd"),
    time("created_at"),
    time("settled_at", nullable=True),
    Index(None, "task_id", "state"),
    Index(None, "task_id", "key"),
    # Few are open at a time: the sweep for orphaned ones does not read the settled ones.
    Index(
        "ix_reservations_open", "task_id", sqlite_where=sql("state = 'open'"), postgresql_where=sql("state = 'open'")
    ),
)

model_journal = Table(
    "model_journal",
    ORCHESTRATOR,
    tenant(primary_key=True),
    Column("key", NAME, primary_key=True),  # the nested key of the model call
    Column("task_id", ID, ForeignKey(tasks.c.task_id, ondelete="CASCADE"), nullable=False),
    Column("step", NAME, nullable=False, server_default=""),
    Column("body_digest", ID, nullable=False),
    Column("answer", LargeBinary(), nullable=False),
    number("prompt_tokens"),
    number("completion_tokens"),
    amount("cost_usd"),
    text("model"),
    time("created_at"),
    Index(None, "task_id"),
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
