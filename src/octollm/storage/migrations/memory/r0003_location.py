"""Where a passage stands in a file that is no text itself, such as a page of a PDF."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0003"
down_revision = "0002"


def upgrade(op: Operations) -> None:
    """Add the column; passages that were stored before have no location."""
    op.add_column("passages", sa.Column("location", sa.Text(), nullable=False, server_default=""))
