"""The retriever as a service: search in given texts and in memory, answers, and work on whole documents."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import get_args

import msgspec

from octollm import Arm, Context, ExecuteResult, FileRef, Message, Task, memory
from octollm.arm import build_arm
from octollm.config import Settings
from octollm.contracts.media_types import kind_of_file
from octollm.contracts.operations import MAX_QUERY_CHARS, Passage, SearchFilters, SearchRequest, SearchResult
from octollm.contracts.service_operations import calls_of
from octollm.contracts.task import DocumentWork
from octollm.rpc.service import Service, ServiceBase
from octollm.services.arms.adapters import ModelAsk, goal_with_constraints, is_capable_model, read_file
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.document_goals import find_document_work
from octollm.services.arms.retriever.answer import answer_question
from octollm.services.arms.retriever.chunks import SourceText, WorkTools, make_source
from octollm.services.arms.retriever.combined import combine_results, split_results
from octollm.services.arms.retriever.comparison import compare_documents
from octollm.services.arms.retriever.extraction import extract_table
from octollm.services.arms.retriever.listing import list_items
from octollm.services.arms.retriever.rewriting import rewrite_documents
from octollm.services.arms.retriever.summary import answer_in_language, summarise
from octollm.text.index_terms import (
    fuse_rankings,
    index_terms,
    inverse_document_frequency,
    match_bm25,
    query_terms,
)
from octollm.text.passages import split_passages
from octollm.text.question_terms import recognize_language

MAX_PASSAGES = 2000
"""Passages of all texts together that are looked through."""


def search_texts(texts: Mapping[str, str], question: str, limit: int) -> list[Passage]:
    """Return at most ``limit`` passages of ``texts`` (name → text) that have words of ``question``, best first."""
    passages: list[Passage] = []
    cut: list[list[str]] = []
    languages: set[str] = set()
    for name, text in texts.items():
        language = recognize_language(text)
        languages.add(language)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        for lines in split_passages(text)[: MAX_PASSAGES - len(passages)]:
            passages.append(Passage(name, digest, lines.line_start, lines.line_end, lines.text, 0.0))
            cut.append(index_terms(lines.text, language))
    terms = query_terms(question, sorted(languages))
    bags = [Counter(each) for each in cut]
    matching = [sum(term.count(bag) > 0 for bag in bags) for term in terms]
    weights = [inverse_document_frequency(count, len(passages)) for count in matching]
    scores = [match.score for match in match_bm25(terms, weights, cut)]
    ranked = sorted(zip(scores, range(len(passages)), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [
        msgspec.structs.replace(p, score=round(score, 4), matched=("words",))
        for score, p in ((score, passages[at]) for score, at in ranked[:limit])
        if score > 0
    ]


_WORK_PROMPT = (
    "Say what the task asks to do with its documents. answer: find one answer. summary: say briefly what they say. "
    "comparison: say how they differ. table: extract fields. list: list all items of a kind. translation: write "
    "them in another language. rewrite: write them in other words. Reply with JSON."
)
_WORK_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"work": {"type": "string", "enum": list(get_args(DocumentWork))}},
    "required": ["work"],
    "additionalProperties": False,
}
_CHUNK_CHARS, _CAPABLE_CHUNK_CHARS = 2400, 12_000
"""Characters of a chunk for the embedded models, and for the model of a provider."""
_RETRY_TEMPERATURE = 0.4
_PARALLEL = 4
"""Chunks at once with the model of a provider; an embedded model generates one answer at a time."""


class _WorkAnswer(msgspec.Struct, frozen=True):
    work: DocumentWork


async def choose_work(goal: str, documents: int, ask: PromptFunction) -> DocumentWork:
    """Return what is to be done with the documents: by rules, else by the model, which may choose among all kinds."""
    work = find_document_work(goal, documents=documents)
    if work is not None:
        return work
    answer = await ask(
        [Message.system(_WORK_PROMPT), Message.user(f"Task: {goal[:1500]}")], max_tokens=20, schema=_WORK_SCHEMA
    )
    try:
        return msgspec.json.decode(answer.encode(), type=_WorkAnswer).work
    except msgspec.DecodeError:
        return "answer"


async def work_on_documents(
    goal: str, work: DocumentWork, sources: Sequence[SourceText], tools: WorkTools
) -> ExecuteResult:
    """Do what a goal asks for with whole documents. Raises what the tools raise."""
    match work:
        case "comparison":
            return await compare_documents(goal, sources, tools)
        case "table":
            return await extract_table(goal, sources, tools)
        case "list":
            return await list_items(goal, sources, tools)
        case "translation" | "rewrite":
            return await rewrite_documents(goal, work, sources, tools)
        case _:
            return await summarise(goal, sources, tools)


def retriever_arm(settings: Settings) -> Arm:
    """Return the retriever."""
    arm = Arm.built_in(
        "retriever",
        "Finds passages in documents and answers questions from them; summarises, compares, extracts, lists, "
        "translates and rewrites, with the lines that it stands on.",
        calls=calls_of("retriever"),
        accepts=("files:text",),
    )

    @arm.operation(kind="read_only")
    async def search(request: SearchRequest, ctx: Context) -> SearchResult:
        """Find passages in what is remembered."""
        return await ctx.send(memory.read, request)

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        """Answer a question from the task's documents, or from all of them when it names none; or work on them."""
        ask, goal = ModelAsk(ctx), goal_with_constraints(task)
        texts = [file for file in task.context.files if kind_of_file(file) == "text"]
        results = split_results(task.context.inputs)
        if results is not None and texts:

            async def look_up(question: str, limit: int) -> Sequence[Passage]:
                return await find_passages(ctx, texts, question, limit)

            return await combine_results(goal, results, [file.name for file in texts], ask, look_up)
        work = await choose_work(goal, len(texts), ask) if texts else "answer"
        if work != "answer":
            sources = [make_source(await read_file(ctx, file)) for file in texts]
            return await work_on_documents(goal, work, sources, bind_tools(ctx, task, ask, settings))

        async def find(question: str, limit: int) -> Sequence[Passage]:
            # A step may have tables beside its documents, which are not in memory as text.
            return await find_passages(ctx, texts or task.context.files, question, limit)

        answer = await answer_question(goal, ask, find, reasons=task.context.reasons, on_text=ask.write)
        return await answer_in_language(goal, answer, bind_tools(ctx, task, ask, settings))

    del search, execute
    return arm


def bind_tools(ctx: Context, task: Task, ask: ModelAsk, settings: Settings) -> WorkTools:
    """Return the tools of work on documents, with the authority, budget and deadline of this call.

    After a refused result the model's answers vary, because the same ones would be refused again.
    """
    is_capable = is_capable_model(settings)
    attempt = ctx.info.attempt or 1

    async def vary(
        messages: Sequence[Message],
        *,
        max_tokens: int,
        schema: dict[str, object] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], Awaitable[None]] | None = None,
        suffices: Callable[[str], bool] | None = None,
    ) -> str:
        if task.context.reasons:
            temperature, seed = max(temperature, _RETRY_TEMPERATURE), seed + 10 * attempt
        return await ask(
            messages,
            max_tokens=max_tokens,
            schema=schema,
            temperature=temperature,
            seed=seed,
            on_text=on_text,
            suffices=suffices,
        )

    return WorkTools(
        vary,
        ctx.progress,
        lambda: ctx.info.budget_left.max_tokens,
        ctx.deadline.remaining,
        ctx.artifacts.write,
        parallel=_PARALLEL if is_capable else 1,
        chunk_chars=_CAPABLE_CHUNK_CHARS if is_capable else _CHUNK_CHARS,
    )


async def find_passages(ctx: Context, files: Sequence[FileRef], question: str, limit: int) -> list[Passage]:
    """Return the passages that match best: of the files that are remembered, and of those given in place.

    Passages carry the names that the files have in this task, whatever they were called elsewhere. Raises what the
    memory raises.
    """
    texts = {file.name: file.text for file in files if file.text is not None}
    names = {file.digest: file.name for file in files if file.digest is not None and file.text is None}
    given = search_texts(texts, question, limit)
    found: list[Passage] = []
    if names or not files:
        request = SearchRequest(question[:MAX_QUERY_CHARS], limit, SearchFilters(tuple(names)))
        remembered = await ctx.send(memory.read, request)
        found = [
            msgspec.structs.replace(passage, source=names.get(passage.digest, passage.source))
            for passage in remembered.passages
        ]
    # Their scores are of two kinds, so their ranks decide.
    ranks = fuse_rankings([(i, 1.0) for i in range(len(given))], [(len(given) + i, 1.0) for i in range(len(found))])
    together = [msgspec.structs.replace(each, score=round(ranks[i], 6)) for i, each in enumerate((*given, *found))]
    return sorted(together, key=lambda passage: -passage.score)[:limit]


@contextlib.asynccontextmanager
async def retriever_service(base: ServiceBase, settings: Settings) -> AsyncGenerator[Service]:
    """Yield the retriever as a service. It holds nothing: what is remembered is the memory's."""
    yield build_arm(retriever_arm(settings), base)
