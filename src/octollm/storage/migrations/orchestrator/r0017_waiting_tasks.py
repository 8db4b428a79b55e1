"""An index of the tasks that wait for a worker, by tenant and in the order in which they run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0017"
down_revision = "0016"


def upgrade(op: Operations) -> None:
    """Add the partial index."""
    waiting = sa.text("lease_until IS NULL AND kind = 'task' AND status IN ('accepted', 'planning', 'running')")
    op.create_index(
        "ix_tasks_waiting",
        "tasks",
        ["tenant", sa.text("priority DESC"), "created_at"],
        sqlite_where=waiting,
        postgresql_where=waiting,
    )
