"""Searching texts that came with a call, which nobody remembers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from octollm.contracts.operations import Passage
from octollm.contracts.passages import split_passages
from octollm.contracts.ranking import bm25
from octollm.contracts.words import content_words, tokenize

MAX_PASSAGES = 2000
"""Passages of all texts together that are looked through."""


def search_texts(texts: Mapping[str, str], question: str, limit: int) -> list[Passage]:
    """Return at most ``limit`` passages of ``texts`` (name → text) that have words of ``question``, best first."""
    found: list[Passage] = []
    for name, text in texts.items():
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        for lines in split_passages(text)[: MAX_PASSAGES - len(found)]:
            found.append(Passage(name, digest, lines.line_start, lines.line_end, lines.text, 0.0))  # noqa: PERF401
    terms = content_words(question) or tokenize(question)
    scores = bm25(terms, [passage.text for passage in found], total=len(found))
    ranked = sorted(zip(scores, range(len(found)), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [
        Passage(p.source, p.digest, p.line_start, p.line_end, p.text, round(score, 4))
        for score, p in ((score, found[at]) for score, at in ranked[:limit])
        if score > 0
    ]
