"""The full-text index of PostgreSQL, as SQLite has its own from the first revision on.

Words are what SQLite's index takes for words: ASCII punctuation parts them, accents are taken off, English
inflections are one word (snowball here, Porter there), and there are no stop words.
"""

from __future__ import annotations

from alembic.operations import Operations

revision = "0002"
down_revision = "0001"

STATEMENTS = (
    # PostgreSQL's own `english` leaves stop words out, which a question may consist of.
    "CREATE TEXT SEARCH DICTIONARY octollm_stem (TEMPLATE = pg_catalog.snowball, Language = english)",
    "CREATE TEXT SEARCH CONFIGURATION octollm (COPY = pg_catalog.simple)",
    """
    ALTER TEXT SEARCH CONFIGURATION octollm
        ALTER MAPPING FOR asciiword, word, numword WITH octollm_stem
    """,
    # It names nothing outside pg_catalog, so a restored dump finds all of it.
    r"""
    CREATE FUNCTION octollm_plain(text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
        SELECT translate(
            regexp_replace(normalize($1, NFKD), '[\u0300-\u036f]', '', 'g'),
            '!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~’',
            repeat(' ', 33)
        )
    $$
    """,
    """
    ALTER TABLE passages ADD COLUMN words tsvector
        GENERATED ALWAYS AS (to_tsvector('octollm', octollm_plain(text))) STORED
    """,
    "CREATE INDEX ix_passages_words ON passages USING gin (words)",
)


def upgrade(op: Operations) -> None:
    """Add the column and its index."""
    if op.get_bind().dialect.name == "postgresql":
        for statement in STATEMENTS:
            op.execute(statement)
