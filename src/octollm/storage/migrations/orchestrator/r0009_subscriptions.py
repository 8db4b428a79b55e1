"""Durable subscriptions: definitions, consumers, partitions, delayed subjects and dead letters."""

# pyright: reportUnknownArgumentType=false
# SQLAlchemy's numeric types are generic in what the driver returns, which a schema does not care about.

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _subscription_id() -> sa.Column[str]:
    return sa.Column("subscription_id", sa.String(length=64), nullable=False)


def _foreign_key(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["subscription_id"],
        ["subscriptions.id"],
        name=f"fk_{table}_subscription_id_subscriptions",
        ondelete="CASCADE",
    )


def _number(name: str, default: str = "0") -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), server_default=default, nullable=False)


def upgrade(op: Operations) -> None:
    """Make the tables."""
    op.create_table(
        "subscriptions",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("event_tenant", sa.String(length=64), nullable=True),
        sa.Column("spec", JSON, nullable=False),
        _number("revision", "1"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subscriptions")),
        sa.UniqueConstraint("tenant", "name", name=op.f("uq_subscriptions_tenant_name")),
    )
    op.create_table(
        "subscription_consumers",
        _subscription_id(),
        sa.Column("consumer", sa.String(length=64), nullable=False),
        sa.Column("joined_at", sa.Double(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        _foreign_key("subscription_consumers"),
        sa.PrimaryKeyConstraint("subscription_id", "consumer", name=op.f("pk_subscription_consumers")),
    )
    op.create_table(
        "subscription_partitions",
        _subscription_id(),
        sa.Column("partition", sa.Integer(), autoincrement=False, nullable=False),
        _number("position"),
        sa.Column("consumer", sa.String(length=64), nullable=True),
        _number("fence"),
        _foreign_key("subscription_partitions"),
        sa.PrimaryKeyConstraint("subscription_id", "partition", name=op.f("pk_subscription_partitions")),
    )
    op.create_table(
        "delayed_subjects",
        _subscription_id(),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False),
        _number("handled"),
        sa.Column("through", sa.BigInteger(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.Column("held", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        _foreign_key("delayed_subjects"),
        sa.PrimaryKeyConstraint("subscription_id", "tenant", "subject", name=op.f("pk_delayed_subjects")),
    )
    op.create_index(
        op.f("ix_delayed_subjects_subscription_id_partition"), "delayed_subjects", ["subscription_id", "partition"]
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", POSITION, autoincrement=True, nullable=False),
        _subscription_id(),
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        _number("seq"),
        sa.Column("event", JSON, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        _foreign_key("dead_letters"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dead_letters")),
        sa.UniqueConstraint("subscription_id", "seq", name=op.f("uq_dead_letters_subscription_id_seq")),
        sqlite_autoincrement=True,
    )
    is_retrying = sa.text("state = 'retrying'")
    op.create_index(
        "ix_dead_letters_retrying",
        "dead_letters",
        ["subscription_id", "partition"],
        sqlite_where=is_retrying,
        postgresql_where=is_retrying,
    )
