"""Search in any language: terms of passages with their full-text index, and the state of their vectors.

The services compute the terms, so passages that are there, or that a replica of the previous version still writes, have
none until they are indexed in the background.
"""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0005"
down_revision = "0004"

SQLITE = (
    # SQLite has one process, which is of the new version from here on.
    "DROP TRIGGER passages_inserted",
    "DROP TRIGGER passages_deleted",
    "DROP TRIGGER passages_updated",
    "DROP TABLE passages_fts",
    # Terms are cut and folded already: only blanks part them. An ASCII tokenizer leaves all other characters alone.
    """
    CREATE VIRTUAL TABLE passage_terms USING fts5(
        terms, content='passages', content_rowid='id', tokenize="ascii tokenchars '_'"
    )
    """,
    "CREATE VIRTUAL TABLE passage_vocabulary USING fts5vocab('passage_terms', 'row')",
    """
    CREATE TRIGGER passages_inserted AFTER INSERT ON passages BEGIN
        INSERT INTO passage_terms(rowid, terms) VALUES (new.id, new.terms);
    END
    """,
    """
    CREATE TRIGGER passages_deleted AFTER DELETE ON passages BEGIN
        INSERT INTO passage_terms(passage_terms, rowid, terms) VALUES ('delete', old.id, old.terms);
    END
    """,
    """
    CREATE TRIGGER passages_updated AFTER UPDATE OF terms ON passages BEGIN
        INSERT INTO passage_terms(passage_terms, rowid, terms) VALUES ('delete', old.id, old.terms);
        INSERT INTO passage_terms(rowid, terms) VALUES (new.id, new.terms);
    END
    """,
    # Counts the passages that are there, or their deletion would make the counts negative.
    "INSERT INTO passage_terms(passage_terms) VALUES ('rebuild')",
)
POSTGRESQL = (
    # Not to_tsvector: its parser would cut the terms again.
    """
    ALTER TABLE passages ADD COLUMN term_vector tsvector
        GENERATED ALWAYS AS (array_to_tsvector(string_to_array(terms, ' '))) STORED
    """,
    "CREATE INDEX ix_passages_term_vector ON passages USING gin (term_vector)",
)


def upgrade(op: Operations) -> None:
    """Add the columns and indexes. PostgreSQL keeps its former index for replicas of the previous version."""
    op.add_column("documents", sa.Column("language", sa.String(length=8), nullable=False, server_default=""))
    op.add_column("documents", sa.Column("media_type", sa.String(length=255), nullable=False, server_default=""))
    op.add_column("documents", sa.Column("embedded", sa.Integer(), nullable=False, server_default="0"))
    op.create_index(op.f("ix_documents_tenant_language"), "documents", ["tenant", "language"], unique=False)
    op.add_column("passages", sa.Column("terms", sa.Text(), nullable=False, server_default=""))
    op.add_column("passages", sa.Column("terms_version", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("passages", sa.Column("embedded_at", sa.Double(), nullable=False, server_default="0"))
    op.create_index(op.f("ix_passages_terms_version"), "passages", ["terms_version"], unique=False)
    op.create_index(
        op.f("ix_passages_vector_model_position_id"), "passages", ["vector_model", "position", "id"], unique=False
    )
    op.create_index(op.f("ix_passages_tenant_embedded_at"), "passages", ["tenant", "embedded_at"], unique=False)
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)
