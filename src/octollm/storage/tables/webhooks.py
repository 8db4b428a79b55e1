"""Tables of hooks with what they received, and of schedules with their runs."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Index, Integer, String, Table

from octollm.storage.tables.columns import (
    ID,
    NAME,
    ORCHESTRATOR,
    json_type,
    number,
    position,
    tenant,
    text,
    time,
)

hooks = Table(
    "hooks",
    ORCHESTRATOR,
    Column("id", ID, primary_key=True),
    tenant(),
    Column("name", NAME, nullable=False),
    Column("scheme", String(16), nullable=False),  # standard, github, stripe, hmac
    Column("config", json_type(), nullable=False),  # template, signature, tolerance
    Column("secrets", json_type(), nullable=False),  # encrypted, the newest first, each with when it ends
    text("scopes"),  # that its tasks may use, as of its creation
    Column("sub", NAME, nullable=False),  # whose authority it has
    Column("cred", NAME, nullable=False),
    time("created_at"),
    time("last_received_at", nullable=True),
    Index(None, "tenant", "name", unique=True),
)

hook_receipts = Table(
    "hook_receipts",
    ORCHESTRATOR,
    Column("hook_id", ID, ForeignKey(hooks.c.id, ondelete="CASCADE"), primary_key=True),
    Column("key", String(128), primary_key=True),  # digest of the sender's id, or of the signed bytes
    Column("task_id", ID, nullable=False),
    time("received_at"),
    Index(None, "received_at"),
)

webhooks = Table(
    "webhooks",
    ORCHESTRATOR,
    Column("id", ID, primary_key=True),
    tenant(),
    text("url"),
    Column("config", json_type(), nullable=False),  # patterns, filters, format, description
    Column("secrets", json_type(), nullable=False),  # encrypted, the newest first, each with when it ends
    Column("sub", NAME, nullable=False),  # whose authority it has
    Column("cred", NAME, nullable=False),
    Column("state", String(16), nullable=False, server_default="active"),  # active, disabled
    text("reason"),
    number("start_seq"),  # it has the events after this position of the log
    number("failures"),  # in a row
    time("failing_since", nullable=True),
    time("paused_until"),
    time("last_delivered_at", nullable=True),
    Column("holder", ID, nullable=False, server_default=""),  # the replica that serves it
    number("epoch"),  # rises with each holder
    time("lease_until"),  # 0 while nobody serves it
    time("created_at"),
    time("updated_at"),
    Index(None, "tenant", "created_at"),
    Index(None, "state", "lease_until"),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    ORCHESTRATOR,
    Column("position", position(), primary_key=True, autoincrement=True),  # the order of the log
    Column("webhook_id", ID, ForeignKey(webhooks.c.id, ondelete="CASCADE"), nullable=False),
    Column("event_id", ID, nullable=False),  # the id of every attempt
    Column("event_type", NAME, nullable=False),
    Column("subject", NAME, nullable=False),
    text("body"),  # the event, as JSON
    Column("state", String(16), nullable=False, server_default="pending"),  # pending, delivered, dead
    Column("attempts", Integer(), nullable=False, server_default="0"),
    time("due_at"),
    time("first_attempt_at", nullable=True),
    Column("last_status", Integer(), nullable=False, server_default="0"),
    text("last_error"),
    time("created_at"),
    time("finished_at", nullable=True),
    Index(None, "webhook_id", "event_id", unique=True),
    Index(None, "webhook_id", "state", "position"),
    Index(None, "state", "finished_at"),
    sqlite_autoincrement=True,
)

webhook_feed = Table(
    "webhook_feed",
    ORCHESTRATOR,
    Column("id", Integer(), primary_key=True),  # there is one row
    number("position"),  # events of the log up to it have their deliveries
)

schedules = Table(
    "schedules",
    ORCHESTRATOR,
    Column("id", ID, primary_key=True),
    tenant(),
    Column("cron", NAME, nullable=False),
    Column("time_zone", NAME, nullable=False),
    Column("catch_up", String(16), nullable=False),  # none, last, all
    Column("overlap", String(16), nullable=False),  # skip, allow
    Column("contract", json_type(), nullable=False),  # the task that is submitted
    text("scopes"),  # that its tasks may use, as of its creation
    Column("sub", NAME, nullable=False),  # whose authority it has
    Column("cred", NAME, nullable=False),
    Column("state", String(16), nullable=False),  # active, paused, ended
    text("reason"),  # why it ended
    time("next_at", nullable=True),
    Column("last_task_id", ID, nullable=False, server_default=""),
    time("created_at"),
    Index(None, "tenant", "created_at"),
    Index(None, "state", "next_at"),
)

schedule_runs = Table(
    "schedule_runs",
    ORCHESTRATOR,
    Column("schedule_id", ID, ForeignKey(schedules.c.id, ondelete="CASCADE"), primary_key=True),
    time("planned_at", primary_key=True),
    Column("outcome", String(16), nullable=False),  # started, skipped, failed
    Column("task_id", ID, nullable=False, server_default=""),
    text("reason"),
)
