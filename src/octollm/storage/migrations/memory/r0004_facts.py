"""Facts get a subject, validity, confidence, a history and sources; documents get sources."""

# pyright: reportUnknownArgumentType=false
# SQLAlchemy's numeric types are generic in what the driver returns, which a schema does not care about.

from __future__ import annotations

import hashlib

import msgspec
import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade(op: Operations) -> None:
    """Make the tables and move each fact there as its first version.

    The old table stays, empty, for replicas of the previous version that still run.
    """
    versions = op.create_table(
        "fact_versions",
        sa.Column("id", POSITION, autoincrement=True, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=255), server_default="", nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("value", JSON, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("words", sa.Text(), server_default="", nullable=False),
        sa.Column("source", sa.String(length=255), server_default="", nullable=False),
        sa.Column("confidence", sa.Double(), server_default="1", nullable=False),
        sa.Column("evidence", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("valid_from", sa.Double(), nullable=False),
        sa.Column("valid_until", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fact_versions")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_fact_versions_tenant_subject_key_version"),
        "fact_versions",
        ["tenant", "subject", "key", "version"],
        unique=True,
    )
    op.create_index(
        op.f("ix_fact_versions_tenant_subject_key_valid_from"),
        "fact_versions",
        ["tenant", "subject", "key", "valid_from"],
        unique=False,
    )
    op.create_table(
        "fact_sources",
        sa.Column("fact_id", POSITION, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("note", sa.String(length=255), server_default="", nullable=False),
        sa.Column("task_id", sa.String(length=128), server_default="", nullable=False),
        sa.Column("document", sa.String(length=64), server_default="", nullable=False),
        sa.Column("sub", sa.String(length=255), server_default="", nullable=False),
        sa.Column("confidence", sa.Double(), server_default="1", nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["fact_id"], ["fact_versions.id"], name=op.f("fk_fact_sources_fact_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("fact_id", "note", "task_id", "document", "sub", name=op.f("pk_fact_sources")),
    )
    op.create_index(op.f("ix_fact_sources_tenant_task_id"), "fact_sources", ["tenant", "task_id"], unique=False)
    op.create_index(op.f("ix_fact_sources_tenant_document"), "fact_sources", ["tenant", "document"], unique=False)
    op.create_table(
        "document_sources",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.String(length=128), server_default="", nullable=False),
        sa.Column("sub", sa.String(length=255), server_default="", nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "digest"],
            ["documents.tenant", "documents.digest"],
            name=op.f("fk_document_sources_tenant_digest"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "digest", "task_id", "sub", name=op.f("pk_document_sources")),
    )
    op.create_index(op.f("ix_document_sources_tenant_task_id"), "document_sources", ["tenant", "task_id"], unique=False)
    _copy_facts(op.get_bind(), versions)


def _copy_facts(bind: sa.Connection, versions: sa.Table) -> None:
    facts = sa.table(
        "facts",
        *(sa.column(name) for name in ("tenant", "key", "source", "version", "created_at", "updated_at")),
        sa.column("value", JSON),
    )
    sources = sa.table("fact_sources", *(sa.column(name) for name in ("fact_id", "tenant", "note", "confidence", "at")))
    rows = bind.execute(sa.delete(facts).returning(*facts.c)).mappings().all()
    for row in rows:
        canonical = msgspec.json.encode(row["value"], order="sorted")
        values = {
            **row,
            "digest": hashlib.sha256(canonical).hexdigest(),
            "words": f"{row['key']} {canonical.decode()}".lower(),
            "valid_from": row["created_at"],
        }
        made = bind.execute(versions.insert().values(**values).returning(versions.c.id)).scalar_one()
        bind.execute(
            sources.insert().values(
                fact_id=made, tenant=row["tenant"], note=row["source"], confidence=1.0, at=row["created_at"]
            )
        )
