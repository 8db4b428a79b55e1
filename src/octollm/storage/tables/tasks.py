"""Tasks, their steps, and the files that they take and make."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Index, Integer, LargeBinary, String, Table, Text

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
