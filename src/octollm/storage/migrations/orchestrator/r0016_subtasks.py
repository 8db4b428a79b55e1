"""Sub-tasks: whose budgets they spend, and what happens to them when the task that they belong to ends."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql

revision = "0016"
down_revision = "0015"

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade(op: Operations) -> None:
    """Add the columns and the indexes."""
    op.add_column("tasks", sa.Column("on_parent_end", sa.String(length=16), server_default="cancel", nullable=False))
    op.add_column("budgets", sa.Column("ancestors", JSON, nullable=True))
    op.add_column("budgets", sa.Column("descendants", sa.BigInteger(), server_default="0", nullable=False))
    is_child = sa.text("parent_task_id IS NOT NULL")
    op.create_index(
        "ix_tasks_children",
        "tasks",
        ["parent_task_id", "created_at"],
        sqlite_where=is_child,
        postgresql_where=is_child,
    )
    is_open = sa.text("parent_task_id IS NOT NULL AND finished_at IS NULL")
    op.create_index(
        "ix_tasks_open_children", "tasks", ["parent_task_id"], sqlite_where=is_open, postgresql_where=is_open
    )
