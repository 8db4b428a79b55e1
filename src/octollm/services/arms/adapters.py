"""Adapters from an arm's Context to the plain callables that the arms' logic takes.

The logic of the built-in arms knows no HTTP: it takes functions for the model, the executor, the judge and files.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from octollm import Context, FileRef, Message, Task, executor, judge
from octollm.config import Settings
from octollm.contracts.operations import RunRequest, RunResult, ValidateRequest, ValidateResult
from octollm.contracts.stream import StreamEvent

MAX_NOTES = 20_000
"""Characters of the notes of earlier steps that an arm reads."""


class ModelAsk:
    """Asks the model in the name of one call, and streams what it writes to whoever watches.

    The object itself is a ``PromptFunction``, and :meth:`write` is its ``on_text``: a further answer voids the text
    before it.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._written = False
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
    ) -> str:
        """Return the model's whole answer; see :class:`octollm.services.arms.completion.PromptFunction`."""
        if on_text is not None:
            self._reset = self._written
        completion = await self._ctx.model.chat(
            messages,
            max_tokens=max_tokens,
            schema=schema,
            temperature=temperature,
            seed=seed,
            on_text=on_text,
        )
        return completion.text

    async def write(self, text: str) -> None:
        """Stream a piece of the answer that is being written."""
        await self._ctx.emit(text, reset=self._reset)
        self._written, self._reset = True, False


async def discard_event(_line: StreamEvent) -> None:
    """Ignore an event: the stream is only there to keep the connection alive while the callee works."""


def bind_run(ctx: Context) -> Callable[[RunRequest], Awaitable[RunResult]]:
    """Return the executor's ``run``, called for this call."""

    async def run(request: RunRequest) -> RunResult:
        return await ctx.send(executor.run, request, on_event=discard_event)

    return run


def bind_validate(ctx: Context) -> Callable[[ValidateRequest], Awaitable[ValidateResult]]:
    """Return the judge's ``validate``, called for this call."""

    async def validate(request: ValidateRequest) -> ValidateResult:
        return await ctx.send(judge.validate, request, on_event=discard_event)

    return validate


async def read_file_text(ctx: Context, file: FileRef) -> str:
    """Return a file's text; bytes that are no UTF-8 are marked. Raises what reading it raises."""
    return (await ctx.artifacts.read(file)).decode("utf-8-sig", errors="replace")


def is_capable_model(settings: Settings) -> bool:
    """Say whether the model can design plans and judge results: a provider's can, the small embedded ones cannot."""
    return settings.model.startswith("openai:")


def goal_with_constraints(task: Task) -> str:
    """Return the goal with the constraints that it came with."""
    goal = task.goal.strip()
    if not task.constraints:
        return goal
    return goal + "\n" + "\n".join(f"- {constraint}" for constraint in task.constraints)


def collect_notes(task: Task) -> str:
    """Return the notes that came with a task, and the outputs of earlier steps, cut to ``MAX_NOTES`` characters."""
    parts = [task.context.text, *task.context.inputs.values()]
    return "\n\n".join(part.strip() for part in parts if part.strip())[:MAX_NOTES]
