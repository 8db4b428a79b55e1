"""What makes a repeated call safe, and what keeps a task within its budget."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, String, Table

from octollm.storage.tables.columns import (
    ID,
    NAME,
    ORCHESTRATOR,
    amount,
    json_type,
    number,
    tenant,
    text,
    time,
)
from octollm.storage.tables.tasks import tasks

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
