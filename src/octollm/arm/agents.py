"""A Pydantic AI agent as an arm.

Its model calls go to ``models`` with the authority of the current call. Nothing global is patched: each run has its own
model object and HTTP client. Needs the extra ``agents``.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any, get_origin

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout
from pydantic import TypeAdapter
from pydantic_ai import Agent, AgentStreamEvent, RunContext
from pydantic_ai.exceptions import AgentRunError, ModelAPIError
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider

from octollm.arm.completion import extract_problem
from octollm.arm.context import Context
from octollm.arm.model import ModelEndpoint
from octollm.contracts.task import Task, Usage
from octollm.errors import ArmError, OctoError

READ_TIMEOUT = 120.0
"""Seconds without a byte from the models service, which sends comments as keep-alives while a model computes."""


def execute_with(agent: Agent[Any, Any], name: str) -> Callable[[Task, Context], Awaitable[object]]:
    """Return an ``execute`` that runs ``agent``; raise ``arm_invalid`` for one with other dependencies than Context."""
    deps_type: type[Any] = get_origin(agent.deps_type) or agent.deps_type
    if deps_type is not type(None) and not issubclass(Context, deps_type):
        raise ArmError(
            f"The agent of the arm {name} has dependencies of type {deps_type.__name__}; an arm's agent has "
            "deps_type=Context, or none."
        )

    async def execute(task: Task, ctx: Context) -> object:
        """Execute the task with the agent."""
        streamer = _TextStreamer(ctx)
        async with _openai_client(await ctx.model.endpoint()) as client:
            model = OpenAIChatModel("default", provider=OpenAICompatibleProvider("octollm", openai_client=client))
            try:
                run_result = await agent.run(
                    build_prompt(task),
                    model=model,
                    deps=None if deps_type is type(None) else ctx,
                    event_stream_handler=streamer.follow,
                )
            except AgentRunError as error:
                raise _translate_error(error) from error
        ctx.model.add_usage(Usage(run_result.usage.input_tokens, run_result.usage.output_tokens))
        output: object = run_result.output
        if isinstance(output, str):
            return output
        kind: type[Any] = type(output)
        return TypeAdapter[Any](kind).dump_json(output).decode()

    return execute


def build_prompt(task: Task) -> str:
    """Return the prompt for a task: goal, constraints, criteria, files, earlier rejections and context."""
    parts = [task.goal]
    for title, lines in (
        ("Keep to this:", (*task.constraints, *task.context.instructions)),
        ("The result is accepted when:", task.acceptance_criteria),
        ("Files:", tuple(file.name for file in task.context.files)),
        ("An earlier answer was refused:", task.context.reasons),
    ):
        if lines:
            parts.append("\n".join((title, *(f"- {line}" for line in lines))))
    context_texts = [text for text in (task.context.text, *task.context.inputs.values()) if text]
    if context_texts:
        parts.append("\n\n".join(("What is known:", *context_texts)))
    return "\n\n".join(parts)


class _TextStreamer:
    """Streams the agent's text; each further answer replaces the one before."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._has_written = False

    async def follow(self, _run: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        reset = self._has_written
        async for event in events:
            text = ""
            if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
                text = event.part.content
            elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
                text = event.delta.content_delta
            if text:
                await self._ctx.emit(text, reset=reset)
                self._has_written, reset = True, False


def _openai_client(endpoint: ModelEndpoint) -> AsyncOpenAI:
    # trust_env=False: the proxies of the environment are for external hosts, and must not see this call and its key.
    timeout = Timeout(READ_TIMEOUT, connect=5.0)
    return AsyncOpenAI(
        base_url=endpoint.base_url,
        api_key=endpoint.api_key,
        default_headers=dict(endpoint.headers),
        timeout=timeout,
        http_client=DefaultAsyncHttpxClient(trust_env=False, timeout=timeout),
    )


def _translate_error(error: AgentRunError) -> OctoError:
    """Return the error of a failed run: the problem document of ``models``, if any, otherwise the agent's error."""
    problem = extract_problem(error)
    if problem is not None:
        return problem
    code = "model_failed" if isinstance(error, ModelAPIError) else "model_output_invalid"
    return OctoError(f"The agent failed: {error}"[:500], code=code)
