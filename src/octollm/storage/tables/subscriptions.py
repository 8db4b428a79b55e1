"""Tables of durable subscriptions: definitions, consumers, partitions, delayed subjects and dead letters."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, Integer, String, Table, UniqueConstraint, false
from sqlalchemy import text as sql

from octollm.storage.tables.columns import (
    ID,
    NAME,
    ORCHESTRATOR,
    TENANT,
    json_type,
    number,
    position,
    tenant,
    text,
    time,
)

subscriptions = Table(
    "subscriptions",
    ORCHESTRATOR,
    Column("id", ID, primary_key=True),
    tenant(),  # whose it is
    Column("name", String(64), nullable=False),
    Column("event_tenant", TENANT, nullable=True),  # whose events it has; NULL is every tenant's
    Column("spec", json_type(), nullable=False),
    # Rises with each change that consumers have to learn of.
    number("revision", 1),
    time("created_at"),
    UniqueConstraint("tenant", "name"),
)


def _subscription_id() -> Column[str]:
    return Column("subscription_id", ID, ForeignKey(subscriptions.c.id, ondelete="CASCADE"), primary_key=True)


subscription_consumers = Table(
    "subscription_consumers",
    ORCHESTRATOR,
    _subscription_id(),
    Column("consumer", ID, primary_key=True),
    time("joined_at"),
    time("lease_until"),
)

subscription_partitions = Table(
    "subscription_partitions",
    ORCHESTRATOR,
    _subscription_id(),
    Column("partition", Integer(), primary_key=True, autoincrement=False),
    number("position"),  # every event up to it is handled, or its subject is delayed
    Column("consumer", ID, nullable=True),  # that holds it
    number("fence"),  # rises with each claim; an acknowledgement under an older one is refused
    text("suspects", nullable=True),  # events that were in hand when a consumer ended, as JSON
)

delayed_subjects = Table(
    "delayed_subjects",
    ORCHESTRATOR,
    _subscription_id(),
    tenant(primary_key=True),
    Column("subject", NAME, primary_key=True),
    Column("partition", Integer(), nullable=False),
    number("handled"),  # the position of the subject's last event that is handled
    Column("through", BigInteger(), nullable=True),  # up to it events are handled here; NULL while it is delayed
    Column("attempts", Integer(), nullable=False, server_default="0"),  # of the subject's next event
    time("due_at"),
    Column("held", Boolean(), nullable=False, server_default=false()),
    text("reason"),
    time("pause", nullable=True),  # seconds; it is due that long after it failed, whatever the clock says
    Index(None, "subscription_id", "partition"),
)

dead_letters = Table(
    "dead_letters",
    ORCHESTRATOR,
    Column("id", position(), primary_key=True, autoincrement=True),
    Column("subscription_id", ID, ForeignKey(subscriptions.c.id, ondelete="CASCADE"), nullable=False),
    Column("partition", Integer(), nullable=False),
    Column("state", String(16), nullable=False),  # dead, held or retrying
    number("seq"),
    Column("event", json_type(), nullable=False),  # the log may drop the event itself
    Column("attempts", Integer(), nullable=False),
    text("reason"),
    time("created_at"),
    time("due_at"),
    UniqueConstraint("subscription_id", "seq"),
    Index(
        "ix_dead_letters_retrying",
        "subscription_id",
        "partition",
        sqlite_where=sql("state = 'retrying'"),
        postgresql_where=sql("state = 'retrying'"),
    ),
    sqlite_autoincrement=True,
)
