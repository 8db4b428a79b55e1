"""Approvals of tasks by a person."""

# pyright: reportUnknownArgumentType=false
# SQLAlchemy's numeric types are generic in what the driver returns, which a schema does not care about.

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade(op: Operations) -> None:
    """Make the table, and the columns for when a task waits and which arms need an approval."""
    op.create_table(
        "approvals",
        sa.Column("task_id", sa.String(length=64), nullable=False),
        sa.Column("approval_id", sa.String(length=255), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("step", sa.String(length=255), server_default="", nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("decided_by", sa.String(length=255), server_default="", nullable=False),
        sa.Column("comment", sa.Text(), server_default="", nullable=False),
        sa.Column("goals", JSON, nullable=True),
        sa.Column("requested_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("decided_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_approvals_task_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id", "approval_id", name=op.f("pk_approvals")),
    )
    is_pending = sa.text("status = 'pending'")
    op.create_index(
        "ix_approvals_pending",
        "approvals",
        ["tenant", "expires_at"],
        sqlite_where=is_pending,
        postgresql_where=is_pending,
    )
    op.add_column("tasks", sa.Column("waiting_since", sa.Double(), nullable=True))
    op.add_column("arms", sa.Column("approval", sa.Text(), server_default="", nullable=False))
