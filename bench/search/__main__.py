"""Benchmark of the memory's search beside plain FTS5 and vectors alone. Prints a table, writes JSON."""

from __future__ import annotations

import argparse
import asyncio
import re
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
from multilingual import LANGUAGES
from reports import save_results

from octollm.clock import SystemClock
from octollm.contracts.operations import SearchRequest
from octollm.services.memory.search import PassageSearch
from octollm.storage import Database, open_database
from octollm.testing import wait_until
from search.corpus import CALL, FACTS, Vectors, embed_facts, fill, open_search, recall

LIMIT = 5
QUESTIONS = 200
"""Questions whose times are measured."""
Row = dict[str, object]
_WORD = re.compile(r"\w+")


def plain_fts5(texts: Sequence[str], question: str, db: sqlite3.Connection) -> list[str]:
    """Search as SQLite's documentation shows it: the default tokenizer, any of the words, its own ranking."""
    match = " OR ".join(f'"{word}"' for word in _WORD.findall(question))
    if not match:
        return []
    rows = db.execute("SELECT rowid FROM plain WHERE plain MATCH ? ORDER BY rank LIMIT ?", (match, LIMIT))
    return [texts[int(row[0])] for row in rows]


def open_plain(texts: Sequence[str]) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE plain USING fts5(text)")
    db.executemany("INSERT INTO plain(rowid, text) VALUES (?, ?)", enumerate(texts))
    return db


async def quality(vectors: Vectors, folder: Path) -> list[Row]:
    texts = [fact.passage for fact in FACTS]
    plain = open_plain(texts)
    by_words = [plain_fts5(texts, fact.question, plain) for fact in FACTS]
    similarity = vectors.questions @ vectors.passages.T
    by_vectors = [[texts[i] for i in np.argsort(-line)[:LIMIT]] for line in similarity]
    async with open_database(f"sqlite:///{folder}/quality.db", clock=SystemClock()) as db:
        await fill(db, vectors, len(FACTS))
        async with open_search(db, vectors) as search:
            hybrid = [await texts_of(search, fact.question) for fact in FACTS]
    rows: list[Row] = []
    for language in LANGUAGES:
        for name, found in (("plain FTS5", by_words), ("vectors alone", by_vectors), ("hybrid", hybrid)):
            rows.append(
                {"name": f"recall@5 {language}, {name}", "value": round(recall(found, language), 3), "unit": "share"}
            )
    return rows


async def texts_of(search: PassageSearch, question: str) -> list[str]:
    return [passage.text for passage in (await search.search(CALL, SearchRequest(question, LIMIT))).passages]


async def times(name: str, ask: Callable[[str], Awaitable[object]]) -> list[Row]:
    questions = [fact.question for fact in FACTS[:: max(1, len(FACTS) // QUESTIONS)]]
    await ask(questions[0])
    taken: list[float] = []
    worked: list[float] = []
    for question in questions:
        began, cpu = time.perf_counter(), time.process_time()
        await ask(question)
        taken.append((time.perf_counter() - began) * 1000)
        worked.append((time.process_time() - cpu) * 1000)
    rows: list[Row] = []
    # The CPU time beside the time that passed: it says what the search costs on a machine that has more to do.
    for title, values in (("", taken), (", CPU", worked)):
        rows += [
            {"name": f"{name}{title}, p50", "value": round(statistics.median(values), 1), "unit": "ms"},
            {"name": f"{name}{title}, p95", "value": round(statistics.quantiles(values, n=20)[18], 1), "unit": "ms"},
        ]
    return rows


async def speed(db: Database, backend: str, vectors: Vectors, count: int) -> list[Row]:
    await fill(db, vectors, count)
    title = f"{count:,} passages, {backend}"
    began = time.perf_counter()
    async with open_search(db, vectors) as search:
        first = time.perf_counter()
        await texts_of(search, FACTS[0].question)
        answered = time.perf_counter()
        request = SearchRequest(FACTS[0].question, LIMIT)

        async def is_hybrid() -> bool:
            return (await search.search(CALL, request)).vectors == "used"

        await wait_until(is_hybrid, description="the vectors are read", timeout=300, interval=0.02)
        rows: list[Row] = [
            {"name": f"{title}: first search, by words", "value": round((answered - first) * 1000, 1), "unit": "ms"},
            {"name": f"{title}: vectors are read after", "value": round(time.perf_counter() - began, 1), "unit": "s"},
        ]
        return rows + await times(f"{title}: hybrid", lambda question: texts_of(search, question))


async def speed_of_peers(vectors: Vectors, count: int, folder: Path) -> list[Row]:
    db = sqlite3.connect(folder / "speed.db")
    texts = [row[0] for row in db.execute("SELECT text FROM passages ORDER BY id")]
    matrix = np.array([np.frombuffer(row[0], "<f4") for row in db.execute("SELECT vector FROM passages ORDER BY id")])
    db.close()
    plain = open_plain(texts)
    known = {fact.question: vector for fact, vector in zip(FACTS, vectors.questions, strict=True)}

    async def by_words(question: str) -> object:
        return plain_fts5(texts, question, plain)

    async def by_vectors(question: str) -> object:
        return np.argpartition(-(matrix @ known[question]), LIMIT)[:LIMIT]

    rows = await times(f"{count:,} passages: plain FTS5 in memory", by_words)
    return rows + await times(f"{count:,} passages: vectors alone, numpy", by_vectors)


async def measure(count: int, postgres: str) -> list[Row]:
    began = time.perf_counter()
    vectors = await embed_facts()
    one = (time.perf_counter() - began) / (2 * len(FACTS)) * 1000
    rows: list[Row] = [{"name": "embedding a sentence, mean", "value": round(one, 1), "unit": "ms"}]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows += await quality(vectors, folder)
        async with open_database(f"sqlite:///{folder}/speed.db", clock=SystemClock()) as db:
            rows += await speed(db, "SQLite", vectors, count)
        rows += await speed_of_peers(vectors, count, folder)
    if postgres:
        async with open_database(f"{postgres}?search_path=octollm_bench_search", clock=SystemClock()) as db:
            rows += await speed(db, "PostgreSQL", vectors, count)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--postgres", default="", help="URL of a database that may be filled")
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments.passages, arguments.postgres))
    for row in rows:
        print(f"{row['name']:<62}{row['value']:>10} {row['unit']}")
    save_results("search", rows)


if __name__ == "__main__":
    main()
