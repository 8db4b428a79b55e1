"""From what a person typed to a full-text query that cannot be anything else.

https://www.sqlite.org/fts5.html#full_text_query_syntax
"""

from __future__ import annotations

from collections.abc import Sequence

from octollm.contracts.words import content_words, tokenize

MAX_TERMS = 32
"""Terms of a query; those after them add little and cost time."""


def extract_search_terms(query: str) -> list[str]:
    """Return the words to look for: those that say nothing are left out unless there are no others."""
    return (content_words(query) or list(dict.fromkeys(tokenize(query))))[:MAX_TERMS]


def build_fts5_expression(terms: Sequence[str]) -> str:
    """Return an FTS5 expression that matches any of ``terms``, of which there is at least one.

    Each is a quoted string, so nothing that a person types is an operator or a syntax error. Inflections are the
    index's business: it stems.
    """
    return " OR ".join('"' + term.replace('"', '""') + '"' for term in terms)
