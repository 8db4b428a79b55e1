"""An index of open reservations, for the sweep that settles those of ended tasks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0007"
down_revision = "0006"


def upgrade(op: Operations) -> None:
    """Add the partial index."""
    is_open = sa.text("state = 'open'")
    op.create_index("ix_reservations_open", "reservations", ["task_id"], sqlite_where=is_open, postgresql_where=is_open)
