"""Arms of one's own: what admits them, their names and keys, and where each of their processes answers."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Index, String, Table

from octollm.storage.tables.access import arms
from octollm.storage.tables.columns import ID, NAME, ORCHESTRATOR, json_type, tenant, text, time

ARM = String(64)

joins = Table(
    "joins",
    ORCHESTRATOR,
    Column("id", ID, primary_key=True),
    tenant(),
    Column("name", ARM, nullable=False),  # the one name that it admits
    Column("calls", json_type(), nullable=False),  # scopes, at most these
    Column("sub", NAME, nullable=False),  # who made it
    time("created_at"),
    time("expires_at"),  # whole seconds: it is part of what the secret is derived from
    time("revoked_at", nullable=True),
    time("used_at", nullable=True),
    Index(None, "tenant", "created_at"),
    Index(None, "name"),
)

join_nonces = Table(
    "join_nonces",
    ORCHESTRATOR,
    Column("nonce", ID, primary_key=True),  # one that was used
    time("until"),
    Index(None, "until"),
)

admissions = Table(
    "admissions",
    ORCHESTRATOR,
    Column("name", ARM, primary_key=True),
    tenant(),  # whose tasks it may be given
    Column("calls", json_type(), nullable=False),  # scopes that it may declare
    Column("join_id", ID, nullable=False),
    time("admitted_at"),
)

arm_keys = Table(
    "arm_keys",
    ORCHESTRATOR,
    Column("name", ARM, ForeignKey(admissions.c.name, ondelete="CASCADE"), primary_key=True),
    Column("jkt", ID, primary_key=True),  # RFC 7638 thumbprint
    time("added_at"),
    time("until", nullable=True),  # a key that a newer one replaced is good until then
)

arm_instances = Table(
    "arm_instances",
    ORCHESTRATOR,
    Column("name", NAME, ForeignKey(arms.c.name, ondelete="CASCADE"), primary_key=True),
    Column("instance", ID, primary_key=True),
    text("url"),
    time("registered_at"),
    time("seen_at"),
    Index(None, "seen_at"),
)
