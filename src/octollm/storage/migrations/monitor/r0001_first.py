"""The first schema."""

# pyright: reportUnknownArgumentType=false
# SQLAlchemy's numeric types are generic in what the driver returns, which a schema does not care about.

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade(op: Operations) -> None:
    """Make every table."""
    op.create_table(
        "spans",
        sa.Column("id", POSITION, autoincrement=True, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.String(length=64), server_default="", nullable=False),
        sa.Column("trace_id", sa.String(length=64), nullable=False),
        sa.Column("span_id", sa.String(length=64), nullable=False),
        sa.Column("parent_id", sa.String(length=64), server_default="", nullable=False),
        sa.Column("service", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("duration_ms", sa.Double(), server_default="0", nullable=False),
        sa.Column("code", sa.String(length=255), server_default="", nullable=False),
        sa.Column("message", sa.Text(), server_default="", nullable=False),
        sa.Column("attributes", JSON, nullable=False),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_spans")),
        sa.UniqueConstraint("service", "trace_id", "span_id", name=op.f("uq_spans_service_trace_id_span_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_spans_tenant_task_id"), "spans", ["tenant", "task_id"], unique=False)
    op.create_index(op.f("ix_spans_trace_id"), "spans", ["trace_id"], unique=False)
    op.create_index(op.f("ix_spans_received_at"), "spans", ["received_at"], unique=False)
