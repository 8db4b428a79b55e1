"""Tables of work: tasks, steps, attempts, files, budgets, idempotency, the model journal, and the event log."""

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

WAITING = "lease_until IS NULL AND kind = 'task' AND status IN ('accepted', 'planning', 'running')"
"""The condition of a task that waits for a worker. A query has to have the same words to use the index."""

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
    time("waiting_since", nullable=True),
    Column("instructions", json_type(), nullable=True),  # that people added while it ran
    Column("on_parent_end", String(16), nullable=False, server_default="cancel"),  # of a sub-task: cancel, or continue
    Index(None, "tenant", "created_at", "task_id"),
    Index(None, "tenant", "sub"),
    Index(None, "status", "lease_until"),
    # Few tasks have a parent.
    Index(
        "ix_tasks_children",
        "parent_task_id",
        "created_at",
        sqlite_where=sql("parent_task_id IS NOT NULL"),
        postgresql_where=sql("parent_task_id IS NOT NULL"),
    ),
    # Of those that are open, for the sweep that ends them with their parent.
    Index(
        "ix_tasks_open_children",
        "parent_task_id",
        sqlite_where=sql("parent_task_id IS NOT NULL AND finished_at IS NULL"),
        postgresql_where=sql("parent_task_id IS NOT NULL AND finished_at IS NULL"),
    ),
)
# The queue: what no worker holds, by tenant and in the order in which it runs.
Index(
    "ix_tasks_waiting",
    tasks.c.tenant,
    tasks.c.priority.desc(),
    tasks.c.created_at,
    sqlite_where=sql(WAITING),
    postgresql_where=sql(WAITING),
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

attempts = Table(
    "attempts",
    ORCHESTRATOR,
    Column("task_id", ID, ForeignKey(tasks.c.task_id, ondelete="CASCADE"), primary_key=True),
    Column("step", NAME, primary_key=True),
    Column("attempt", Integer(), primary_key=True),
    Column("run", Integer(), nullable=False, server_default="0"),  # that made it last
    Column("arm", NAME, nullable=False),
    text("title"),
    Column("status", String(16), nullable=False),  # running, accepted, rejected, failed, interrupted, reused
    Column("request", json_type(), nullable=False),
    Column("outcome", json_type(), nullable=True),
    Column("trace_id", NAME, nullable=False, server_default=""),
    time("started_at"),
    time("finished_at", nullable=True),
)

approvals = Table(
    "approvals",
    ORCHESTRATOR,
    Column("task_id", ID, ForeignKey(tasks.c.task_id, ondelete="CASCADE"), primary_key=True),
    Column("approval_id", NAME, primary_key=True),
    tenant(),
    Column("position", Integer(), nullable=False),  # among the task's
    Column("kind", String(16), nullable=False),  # plan, step, spending
    Column("step", NAME, nullable=False, server_default=""),
    text("reason"),
    Column("status", String(16), nullable=False),  # pending, approved, rejected, expired, cancelled
    Column("decided_by", NAME, nullable=False, server_default=""),
    text("comment"),
    Column("goals", json_type(), nullable=True),  # step → goal that the person changed
    time("requested_at"),
    time("expires_at"),
    time("decided_at", nullable=True),
    # Few are pending at a time.
    Index(
        "ix_approvals_pending",
        "tenant",
        "expires_at",
        sqlite_where=sql("status = 'pending'"),
        postgresql_where=sql("status = 'pending'"),
    ),
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
    Column("role", String(16), primary_key=True),  # input, or attempt for what an attempt made
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
    Column("ancestors", json_type(), nullable=True),  # of a sub-task, whose budgets it also spends; the root first
    number("descendants"),  # tasks below a root, of all generations
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
    # That inserted it, filled in by PostgreSQL. Only services of the previous version read it, which keep running
    # during an upgrade.
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

memory_erasures = Table(
    # What tasks that retention deleted have left in the memory, which is another service.
    "memory_erasures",
    ORCHESTRATOR,
    tenant(primary_key=True),
    Column("task_id", ID, primary_key=True),
    time("due_at"),
    Index(None, "due_at"),
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
