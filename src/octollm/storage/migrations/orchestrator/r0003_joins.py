"""Arms of one's own: enrolment tokens, admitted names and keys, and the processes of every arm."""

# pyright: reportUnknownArgumentType=false
# SQLAlchemy's numeric types are generic in what the driver returns, which a schema does not care about.

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade(op: Operations) -> None:
    """Make the tables, and give the arms a sentence for each operation."""
    op.add_column("arms", sa.Column("about", JSON, nullable=True))
    op.create_table(
        "joins",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("calls", JSON, nullable=False),
        sa.Column("sub", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column("used_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_joins")),
    )
    op.create_index(op.f("ix_joins_tenant_created_at"), "joins", ["tenant", "created_at"], unique=False)
    op.create_index(op.f("ix_joins_name"), "joins", ["name"], unique=False)
    op.create_table(
        "join_nonces",
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("nonce", name=op.f("pk_join_nonces")),
    )
    op.create_index(op.f("ix_join_nonces_until"), "join_nonces", ["until"], unique=False)
    op.create_table(
        "admissions",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("calls", JSON, nullable=False),
        sa.Column("join_id", sa.String(length=64), nullable=False),
        sa.Column("admitted_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_admissions")),
    )
    op.create_table(
        "arm_keys",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("jkt", sa.String(length=64), nullable=False),
        sa.Column("added_at", sa.Double(), nullable=False),
        sa.Column("until", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["name"], ["admissions.name"], name=op.f("fk_arm_keys_name"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("name", "jkt", name=op.f("pk_arm_keys")),
    )
    op.create_table(
        "arm_instances",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("instance", sa.String(length=64), nullable=False),
        sa.Column("url", sa.Text(), server_default="", nullable=False),
        sa.Column("registered_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["name"], ["arms.name"], name=op.f("fk_arm_instances_name"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("name", "instance", name=op.f("pk_arm_instances")),
    )
    op.create_index(op.f("ix_arm_instances_seen_at"), "arm_instances", ["seen_at"], unique=False)
