"""Tables of access: API keys, sessions, revocations, the audit log, arms with enrolment tokens, keys, instances."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, String, Table

from octollm.storage.tables.columns import (
    ID,
    NAME,
    ORCHESTRATOR,
    TENANT,
    json_type,
    position,
    tenant,
    text,
    time,
)

api_keys = Table(
    "api_keys",
    ORCHESTRATOR,
    Column("id", ID, primary_key=True),
    Column("hash", ID, nullable=False, unique=True),
    tenant(),
    Column("sub", NAME, nullable=False),
    Column("name", NAME, nullable=False, server_default=""),
    text("scopes"),  # separated by spaces
    time("created_at"),
    time("revoked_at", nullable=True),
    time("last_used_at", nullable=True),
    Index(None, "tenant", "sub"),
)

sessions = Table(
    "sessions",
    ORCHESTRATOR,
    Column("id", ID, primary_key=True),
    Column("hash", ID, nullable=False),
    tenant(),
    Column("cred", NAME, nullable=False),  # the credential that it was opened for
    time("created_at"),
    time("expires_at"),
    Column("tokens", json_type(), nullable=False),  # jti of the access tokens that it was given last
    Index(None, "cred"),
    Index(None, "expires_at"),
)

revocations = Table(
    "revocations",
    ORCHESTRATOR,
    Column("position", position(), primary_key=True, autoincrement=True),  # where a reader goes on
    Column("kind", String(16), nullable=False),  # jti, task, run, sub, cred, aud
    Column("value", NAME, nullable=False),
    time("at"),  # links issued at or before it are refused
    time("until"),  # kept until the longest-lived of them has expired
    Column("tenant", TENANT, nullable=False, server_default=""),  # none: every tenant
    Index(None, "kind", "value"),
    Index(None, "until"),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    ORCHESTRATOR,
    Column("position", position(), primary_key=True, autoincrement=True),
    tenant(),
    time("at"),
    Column("action", String(64), nullable=False),
    Column("sub", NAME, nullable=False, server_default=""),
    Column("cred", NAME, nullable=False, server_default=""),
    Column("service", NAME, nullable=False, server_default=""),
    Column("target", NAME, nullable=False, server_default=""),
    Column("detail", json_type(), nullable=True),
    Column("request_id", NAME, nullable=False, server_default=""),
    Column("correlation_id", NAME, nullable=False, server_default=""),
    # Its place in the tenant's chain, once it is sealed: from 1, without a gap; the hash covers the row and the last.
    Column("seq", BigInteger(), nullable=True),
    Column("hash", String(64), nullable=True),
    text("checkpoint", nullable=True),  # signed; on the last row that was sealed at a time
    Index(None, "tenant", "position"),
    Index(None, "tenant", "seq", unique=True),
    sqlite_autoincrement=True,
)
Index("ix_audit_unsealed", audit.c.position, postgresql_where=audit.c.seq.is_(None), sqlite_where=audit.c.seq.is_(None))

audit_heads = Table(
    "audit_heads",
    ORCHESTRATOR,
    Column("tenant", TENANT, primary_key=True),
    Column("seq", BigInteger(), nullable=False),
    Column("hash", String(64), nullable=False),
    text("checkpoint"),
    # The last row that is in the archive and not here.
    Column("cut_seq", BigInteger(), nullable=False, server_default="0"),
    Column("cut_hash", String(64), nullable=False, server_default=""),
    text("cut_checkpoint"),
)

arms = Table(
    "arms",
    ORCHESTRATOR,
    Column("name", NAME, primary_key=True),
    text("description"),
    Column("operations", json_type(), nullable=False),
    Column("calls", json_type(), nullable=False),
    Column("accepts", json_type(), nullable=False),
    text("url"),
    Column("jkt", NAME, nullable=False),  # RFC 7638 thumbprint of its key
    Column("state", String(16), nullable=False, server_default="healthy"),  # healthy, unhealthy
    time("registered_at"),
    time("seen_at"),
    Column("about", json_type(), nullable=True),  # operation → what it does
    Column("operation_calls", json_type(), nullable=True),  # operation → its calls, where they are not the arm's
    text("approval"),  # why a person has to approve its steps; empty if nobody has to
)


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
