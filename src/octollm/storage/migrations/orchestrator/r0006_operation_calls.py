"""Declared calls of each operation of an arm, where they differ from the arm's."""

# pyright: reportUnknownArgumentType=false
# SQLAlchemy's numeric types are generic in what the driver returns, which a schema does not care about.

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade(op: Operations) -> None:
    """Add the column; arms that registered before have the same calls for every operation."""
    op.add_column("arms", sa.Column("operation_calls", JSON, nullable=True))
