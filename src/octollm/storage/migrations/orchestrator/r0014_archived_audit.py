"""Where the audit log was cut for the archive, and what is still to erase from the memory."""

# pyright: reportUnknownArgumentType=false
# SQLAlchemy's numeric types are generic in what the driver returns, which a schema does not care about.

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0014"
down_revision = "0013"


def upgrade(op: Operations) -> None:
    """Add the columns and the table."""
    op.add_column("audit_heads", sa.Column("cut_seq", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("audit_heads", sa.Column("cut_hash", sa.String(length=64), server_default="", nullable=False))
    op.add_column("audit_heads", sa.Column("cut_checkpoint", sa.Text(), server_default="", nullable=False))
    op.create_table(
        "memory_erasures",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.String(length=64), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "task_id", name=op.f("pk_memory_erasures")),
    )
    op.create_index("ix_memory_erasures_due_at", "memory_erasures", ["due_at"])
