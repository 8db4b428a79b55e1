"""Arms that the tests of the arm kit share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
from pydantic import BaseModel, Field

from octollm import Arm, Context, ExecuteResult, FileRef, OctoError, Task

translator = Arm(
    "translator",
    description="Translates text",
    calls=["retriever:search", "models:chat"],
    optional_calls=["judge:validate", "files:read", "files:write"],
)


@translator.operation
async def execute(task: Task, ctx: Context) -> str:
    """Translate the goal."""
    found = await ctx.call("retriever", "search", {"query": task.goal})
    text = ""
    async for piece in ctx.model.stream(f"Translate with {found}: {task.goal}"):
        await ctx.emit(piece)
        text += piece
    return text


@dataclass
class Count:
    text: str
    least: int = 1


class Words(msgspec.Struct):
    words: int
    task_known: bool


@translator.operation(kind="read_only")
async def count(body: Count, ctx: Context) -> Words:
    """Count the words of a text."""
    return Words(len(body.text.split()), ctx.task is not None)


class Tone(BaseModel):
    """How a text is to sound."""

    formal: bool
    warmth: int = Field(ge=0, le=10)


class Letter(BaseModel):
    to: str = Field(min_length=2)
    tones: list[Tone] = []


class SentLetter(BaseModel):
    text: str


@translator.operation
async def letter(body: Letter, ctx: Context) -> SentLetter:
    """Write a letter."""
    await ctx.progress(10, "begun")
    draft = await ctx.model.structured(f"Write to {body.to}", SentLetter, system="You write letters.")
    return SentLetter(text=f"{draft.text} ({len(body.tones)} tones)")


@translator.operation
async def echo(body: str, ctx: Context) -> dict[str, list[str]]:
    """Answer a plain text with a dict."""
    return {"words": body.split()}


@translator.operation
async def copy(task: Task, ctx: Context) -> list[str]:
    """Copy every file of a task to an artifact."""
    for file in task.context.files:
        await ctx.artifacts.write("copy of " + file.name, await ctx.artifacts.read(file))
    return [artifact.name for artifact in ctx.artifacts.list()]


@translator.operation
async def check(body: str, ctx: Context) -> str:
    """Have code checked where that is allowed."""
    if not ctx.allows("judge:validate"):
        return "unchecked"
    verdict = await ctx.call("judge", "validate", {"code": body})
    return "valid" if verdict["is_valid"] else "; ".join(verdict["reasons"])


@translator.operation
async def overreach(body: str, ctx: Context) -> str:
    """Call what the arm does not declare."""
    service, _, operation = body.partition(":")
    await ctx.call(service, operation, {})
    return "it was let through"


@translator.operation
async def steal(body: str, ctx: Context) -> str:
    """Read a file that is not the task's."""
    return (await ctx.artifacts.read(FileRef("secret", digest=body))).decode()


@translator.operation
async def fail(body: str, ctx: Context) -> str:
    """Fail as the body says."""
    if body == "crash":
        raise ValueError("a secret of the arm")
    if body == "wrong":
        return 3  # pyright: ignore[reportReturnType]  that is the mistake
    raise OctoError("There is no such language.", code=body)


@translator.operation
async def leave_open(body: str, ctx: Context) -> str:
    """Begin a stream and leave it open."""
    stream = ctx.model.stream(body)
    first = await anext(stream)
    ctx.log.info("left.open")
    return first


@translator.operation
async def wait(body: str, ctx: Context) -> str:
    """Wait until the caller leaves."""
    await asyncio.Event().wait()
    return body


silent = Arm("silent", description="Declares nothing")


@silent.operation
async def ask(body: str, ctx: Context) -> str:
    """Ask a model without having declared it."""
    return await ctx.model.complete(body)


reporter = Arm("reporter", description="Reports", calls=["files:write"])


@reporter.operation("execute")
async def report(task: Task, ctx: Context) -> Words:
    """Answer a task with a type of one's own."""
    await ctx.artifacts.write("report.md", "# Report\n")
    return Words(len(task.goal.split()), ctx.task is task)


teller = Arm("teller", description="Says itself what it made")


@teller.operation("execute")
async def tell(task: Task, ctx: Context) -> ExecuteResult:
    """Answer a task with a whole result."""
    return ExecuteResult(f"{task.goal} for {ctx.task_id[:8]}")
