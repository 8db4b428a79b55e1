"""Events keep the transaction that inserted them, so that the relay overtakes none (PostgreSQL)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"


def upgrade(op: Operations) -> None:
    """Add the column; on PostgreSQL the server fills it in, also for code that does not know of it."""
    op.add_column("events", sa.Column("transaction_id", sa.BigInteger(), nullable=True))
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE events ALTER COLUMN transaction_id SET DEFAULT pg_current_xact_id()::text::bigint")
