"""The retriever as a service: BM25 search over the texts of a call and over memory, and answers with citations."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence

import msgspec

from octollm import Arm, Context, ExecuteResult, FileRef, Task, memory
from octollm.arm import build_arm
from octollm.config import Settings
from octollm.contracts.operations import Passage, SearchFilters, SearchRequest, SearchResult
from octollm.contracts.service_operations import calls_of
from octollm.rpc.service import Service, ServiceBase
from octollm.services.arms.adapters import ModelAsk, goal_with_constraints
from octollm.services.arms.retriever.answer import answer_question
from octollm.text.lexical import bm25, content_words, tokenize
from octollm.text.passages import split_passages

MAX_PASSAGES = 2000
"""Passages of all texts together that are looked through."""


def search_texts(texts: Mapping[str, str], question: str, limit: int) -> list[Passage]:
    """Return at most ``limit`` passages of ``texts`` (name → text) that have words of ``question``, best first."""
    passages: list[Passage] = []
    for name, text in texts.items():
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        for lines in split_passages(text)[: MAX_PASSAGES - len(passages)]:
            passages.append(Passage(name, digest, lines.line_start, lines.line_end, lines.text, 0.0))  # noqa: PERF401
    terms = content_words(question) or tokenize(question)
    scores = bm25(terms, [passage.text for passage in passages], total=len(passages))
    ranked = sorted(zip(scores, range(len(passages)), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [
        Passage(p.source, p.digest, p.line_start, p.line_end, p.text, round(score, 4))
        for score, p in ((score, passages[at]) for score, at in ranked[:limit])
        if score > 0
    ]


def retriever_arm() -> Arm:
    """Return the retriever."""
    arm = Arm.built_in(
        "retriever",
        "Finds passages in documents and answers questions from them, with the lines that it stands on.",
        calls=calls_of("retriever"),
        accepts=("files:text",),
    )

    @arm.operation(kind="read_only")
    async def search(request: SearchRequest, ctx: Context) -> SearchResult:
        """Find passages in what is remembered."""
        return await ctx.send(memory.read, request)

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        """Answer a question from the task's documents, or from all of them when it names none."""
        ask = ModelAsk(ctx)

        async def find(question: str, limit: int) -> Sequence[Passage]:
            return await find_passages(ctx, task.context.files, question, limit)

        return await answer_question(
            goal_with_constraints(task), ask, find, reasons=task.context.reasons, on_text=ask.write
        )

    del search, execute
    return arm


async def find_passages(ctx: Context, files: Sequence[FileRef], question: str, limit: int) -> list[Passage]:
    """Return the passages that match best: of the files that are remembered, and of those given in place.

    Passages carry the names that the files have in this task, whatever they were called elsewhere. Raises what the
    memory raises.
    """
    texts = {file.name: file.text for file in files if file.text is not None}
    names = {file.digest: file.name for file in files if file.digest is not None and file.text is None}
    passages = search_texts(texts, question, limit)
    if names or not files:
        request = SearchRequest(question, limit, SearchFilters(tuple(names)))
        remembered = await ctx.send(memory.read, request)
        passages += [
            msgspec.structs.replace(passage, source=names.get(passage.digest, passage.source))
            for passage in remembered.passages
        ]
    passages.sort(key=lambda passage: -passage.score)
    return passages[:limit]


@contextlib.asynccontextmanager
async def retriever_service(base: ServiceBase, settings: Settings) -> AsyncGenerator[Service]:
    """Yield the retriever as a service. It holds nothing: what is remembered is the memory's."""
    del settings
    yield build_arm(retriever_arm(), base)
