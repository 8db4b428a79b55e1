"""What a type checker knows of an arm; every line that is ignored here has to be an error (see test_arm_typing.py)."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from octollm import Arm, Context, OperationReference, Task, judge, retriever


class Pool:
    size = 3


@dataclass
class Word:
    word: str


@asynccontextmanager
async def open_pool() -> AsyncGenerator[Pool]:
    yield Pool()


pooled = Arm("pooled", "Has a pool", calls=[retriever.search, "judge:validate"], lifespan=open_pool)
plain = Arm("plain", "Has none")
lookup = OperationReference("glossary", "lookup", Word, Word)


@pooled.operation
async def execute(task: Task, ctx: Context[Pool]) -> str:
    size: int = ctx.state.size
    found = await ctx.call(retriever.search, query=task.goal, limit=size)
    text: str = found.passages[0].text
    score: str = found.passages[0].score  # pyright: ignore[reportAssignmentType]
    word: str = (await ctx.call(lookup, word=text)).word
    by_name = await ctx.call("judge", "validate", {"code": word}, Word)
    return by_name.word + score


@pooled.operation(kind="read_only", calls=[judge.validate])
async def wrong(task: Task, ctx: Context[Pool]) -> int:
    await ctx.call(retriever.search, question=task.goal)  # pyright: ignore[reportCallIssue]
    await ctx.call(retriever.search, query=3)  # pyright: ignore[reportArgumentType]
    await ctx.call(judge.validate)  # pyright: ignore[reportCallIssue]
    return ctx.state.colour  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]


@plain.operation  # pyright: ignore[reportArgumentType, reportCallIssue, reportUntypedFunctionDecorator]
async def without_pool(task: Task, ctx: Context[Pool]) -> str:
    return task.goal


@plain.operation
async def untyped_state(task: Task, ctx: Context) -> str:
    return task.goal


Arm("ported", "Has a port", port=8110)  # pyright: ignore[reportArgumentType]
