"""Revocations name their tenant; audit rows are sealed into a chain for each tenant."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0004"
down_revision = "0003"


def upgrade(op: Operations) -> None:
    """Add the columns; rows of code that does not know of them are revoked for every tenant, and sealed later."""
    op.add_column("revocations", sa.Column("tenant", sa.String(length=64), server_default="", nullable=False))
    op.add_column("audit", sa.Column("seq", sa.BigInteger(), nullable=True))
    op.add_column("audit", sa.Column("hash", sa.String(length=64), nullable=True))
    op.add_column("audit", sa.Column("checkpoint", sa.Text(), nullable=True))
    op.create_index(op.f("ix_audit_tenant_seq"), "audit", ["tenant", "seq"], unique=True)
    unsealed = sa.text("seq IS NULL")
    op.create_index("ix_audit_unsealed", "audit", ["position"], postgresql_where=unsealed, sqlite_where=unsealed)
    op.create_table(
        "audit_heads",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("checkpoint", sa.Text(), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_audit_heads")),
    )
