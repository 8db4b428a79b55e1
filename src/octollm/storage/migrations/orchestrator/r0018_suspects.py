"""Events that were in hand when the consumer of a durable subscription ended, and the pauses of retries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0018"
down_revision = "0017"


def upgrade(op: Operations) -> None:
    """Add the columns."""
    op.add_column("subscription_partitions", sa.Column("suspects", sa.Text(), nullable=True))
    op.add_column("delayed_subjects", sa.Column("pause", sa.Double(), nullable=True))
