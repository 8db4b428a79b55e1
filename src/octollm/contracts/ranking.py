"""Which passage says most of what is looked for: BM25 over the passages of one tenant.

The index's own BM25 counts the passages of all tenants, and gives a word no weight that half of them have: wrong
for the few passages of a task's documents, and telling of other tenants'. Robertson and Zaragoza, "The Probabilistic
Relevance Framework: BM25 and Beyond" (2009); the weight of a word is Lucene's, which is never negative.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from octollm.contracts.words import stem, tokenize

BM25_K1, BM25_B = 1.2, 0.75


def bm25(terms: Sequence[str], texts: Sequence[str], *, total: int) -> list[float]:
    """Return a score for each of ``texts``, higher is better, never negative.

    ``texts`` are all passages that have any of ``terms``, out of ``total``.
    """
    wanted = list(dict.fromkeys(stem(term) for term in terms))
    counted = [Counter(stem(word) for word in tokenize(text)) for text in texts]
    lengths = [counter.total() for counter in counted]
    mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
    weights = {term: _idf(sum(term in counter for counter in counted), max(total, len(texts))) for term in wanted}
    return [
        sum(weights[term] * _saturated(counter[term], length / mean) for term in wanted if term in counter)
        for counter, length in zip(counted, lengths, strict=True)
    ]


def _idf(having: int, total: int) -> float:
    return math.log(1 + (total - having + 0.5) / (having + 0.5))


def _saturated(count: int, relative_length: float) -> float:
    return count * (BM25_K1 + 1) / (count + BM25_K1 * (1 - BM25_B + BM25_B * relative_length))
