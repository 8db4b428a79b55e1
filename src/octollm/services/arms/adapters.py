"""Adapters from an arm's Context to the plain callables that the arms' logic takes.

The logic of the built-in arms knows no HTTP: it takes functions for the model, the executor, the judge and files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from octollm import Context, FileRef, Message, OctoError, Task, executor, judge
from octollm.arm.completion import check_not_filtered
from octollm.config import Settings
from octollm.contracts.operations import RunRequest, RunResult, ValidateRequest, ValidateResult
from octollm.contracts.stream import StreamEvent
from octollm.documents.decoding import decode_text
from octollm.documents.detection import PLAIN_KINDS, detect_kind
from octollm.documents.model import FlatDocument, decode_flat_document, flatten
from octollm.documents.reading import read_plain

RETRY_FACTOR = 4
"""How much larger the limit is when an answer that was cut is asked for again."""
MAX_RETRY_TOKENS = 4096
MAX_NOTES = 20_000
"""Characters of the notes and outputs of earlier steps."""


class ModelAsk:
    """Asks the model on behalf of one call, and streams its text to clients that watch the task.

    The object itself is a ``PromptFunction``, and :meth:`write` is its ``on_text``. The first text of a further answer
    tells clients to discard the text of the answer before it.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._has_written = False
        self._reset = False

    async def __call__(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        schema: dict[str, object] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], Awaitable[None]] | None = None,
        suffices: Callable[[str], bool] | None = None,
    ) -> str:
        """Return the model's whole answer; see :class:`octollm.services.arms.completion.PromptFunction`."""
        for limit in (max_tokens, min(RETRY_FACTOR * max_tokens, max(MAX_RETRY_TOKENS, max_tokens))):
            if on_text is not None:
                self._reset = self._has_written
            completion = await self._ctx.model.chat(
                messages,
                max_tokens=limit,
                schema=schema,
                temperature=temperature,
                seed=seed,
                on_text=on_text,
            )
            check_not_filtered(completion)
            if completion.finish_reason != "length" or (suffices is not None and suffices(completion.text)):
                return completion.text
        raise OctoError(
            f"The model's answer was cut at {completion.usage.completion_tokens} tokens.",
            code="model_output_truncated",
        )

    async def write(self, text: str) -> None:
        """Stream a piece of the current answer."""
        await self._ctx.emit(text, reset=self._reset)
        self._has_written, self._reset = True, False


async def discard_event(_line: StreamEvent) -> None:
    """Ignore an event: the stream is only there to keep the connection alive while the callee works."""


def bind_run(ctx: Context) -> Callable[[RunRequest], Awaitable[RunResult]]:
    """Return the executor's ``run`` with the authority and deadline of this call."""

    async def run(request: RunRequest) -> RunResult:
        return await ctx.send(executor.run, request, on_event=discard_event)

    return run


def bind_validate(ctx: Context) -> Callable[[ValidateRequest], Awaitable[ValidateResult]]:
    """Return the judge's ``validate`` with the authority and deadline of this call."""

    async def validate(request: ValidateRequest) -> ValidateResult:
        return await ctx.send(judge.validate, request, on_event=discard_event)

    return validate


async def read_file(ctx: Context, file: FileRef, *, as_source: bool = False) -> FlatDocument:
    """Return the text of a file of any format. ``as_source`` returns the source of an HTML page, not what it shows.

    Text is decoded here, and the executor reads binary formats. Raises :class:`DocumentError`, and what reading the
    bytes and the executor raise.
    """
    if file.text is not None:
        return FlatDocument(file.name, "text", file.text)
    data = await ctx.artifacts.read(file)
    kind = await asyncio.to_thread(detect_kind, file.name, data)
    if kind in PLAIN_KINDS:
        if as_source:
            decoded = await asyncio.to_thread(decode_text, data)
            return FlatDocument(file.name, kind, decoded.text, (), decoded.notes)
        return flatten(await asyncio.to_thread(read_plain, file.name, data))
    result = await ctx.send(executor.run, RunRequest("read", (), (file,)), on_event=discard_event)
    return decode_flat_document(result.stdout)


async def read_file_text(ctx: Context, file: FileRef, *, as_source: bool = False) -> str:
    """Return the text of a file; see :func:`read_file`."""
    return (await read_file(ctx, file, as_source=as_source)).text


def is_capable_model(settings: Settings) -> bool:
    """Return whether the model can design plans and judge results: a provider's can, the embedded are too small."""
    return settings.model.startswith("openai:")


def goal_with_constraints(task: Task) -> str:
    """Return the goal followed by the task's constraints, and by what a person added since, as a list."""
    return "\n".join((task.goal.strip(), *(f"- {each}" for each in (*task.constraints, *task.context.instructions))))


def collect_notes(task: Task) -> str:
    """Return the task's notes and the outputs of earlier steps, at most ``MAX_NOTES`` characters."""
    parts = [task.context.text, *task.context.inputs.values()]
    return "\n\n".join(part.strip() for part in parts if part.strip())[:MAX_NOTES]
