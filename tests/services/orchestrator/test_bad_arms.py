"""An arm that answers the wrong shape, too much, too slowly or never: its step fails, and the reason is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from enrolled import enrolled
from orchestrator_kit import Script, orchestrator_kit
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from octollm.arm import Arm, Context
from octollm.contracts.task import ExecuteResult, Task
from octollm.errors import OctoError, RetryStep

NDJSON = "application/x-ndjson"
Handler = Callable[[Request], Awaitable[Response]]


def lines(*parts: bytes, forever: bool = False) -> Response:
    async def stream() -> AsyncIterator[bytes]:
        for part in parts:
            yield part
        while forever:
            yield b'{"type":"heartbeat"}\n'
            await asyncio.sleep(0.05)

    return StreamingResponse(stream(), media_type=NDJSON)


async def another_shape(_request: Request) -> Response:
    return lines(b'{"type":"result","result":{"text":"it is called output"}}\n')


async def a_page(_request: Request) -> Response:
    return HTMLResponse("<html>Welcome</html>")


async def too_much(_request: Request) -> Response:
    return JSONResponse({"output": "x" * 9 * 1024 * 1024})


async def no_json(_request: Request) -> Response:
    return lines(b"<html>Welcome</html>\n")


async def a_line_without_end(_request: Request) -> Response:
    return lines(*[b"x" * 1024 * 1024] * 12)


async def truncated_stream(_request: Request) -> Response:
    return lines(b'{"type":"token","text":"half of"}\n')


async def server_error(_request: Request) -> Response:
    return Response("Traceback (most recent call last): secret", 500, media_type="text/plain")


async def never_answer(_request: Request) -> Response:
    await asyncio.Event().wait()
    raise AssertionError


async def endless_stream(_request: Request) -> Response:
    return lines(forever=True)


async def run_with(handler: Handler, folder: Path, seconds: float) -> dict[str, Any]:
    coder = Starlette(routes=[Route("/execute", handler, methods=["POST"])])
    async with orchestrator_kit(folder, Script(), coder=coder) as orch:
        view = await orch.run({"goal": "do it", "budget": {"max_time_seconds": seconds, "max_retries": 0}})
        assert view.status == "failed"
        assert view.error is not None
        return {"code": view.error.code, "said": " ".join((view.error.detail, *view.error.reasons))}


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (another_shape, "malformed response"),
        (a_page, "malformed response"),
        (too_much, "a response that is too long"),
        (no_json, "a malformed line"),
        (a_line_without_end, "a line that is too long"),
    ],
)
async def test_what_is_not_understood_is_not_taken(tmp_path: Path, handler: Handler, text: str) -> None:
    found = await run_with(handler, tmp_path, 15)
    assert found["code"] == "peer_protocol"
    assert text in found["said"]
    assert "coder" in found["said"]


async def test_a_failure_is_told_without_what_the_arm_said_of_its_insides(tmp_path: Path) -> None:
    found = await run_with(server_error, tmp_path, 15)
    assert "secret" not in found["said"]
    assert "coder" in found["said"]


async def test_an_answer_that_breaks_off_is_asked_for_again_and_told(tmp_path: Path) -> None:
    found = await run_with(truncated_stream, tmp_path, 3)
    assert found["code"] in ("connection_lost", "deadline_exceeded")


async def test_an_arm_that_answers_in_one_piece_is_as_good(tmp_path: Path) -> None:
    async def plain(_request: Request) -> Response:
        return JSONResponse({"output": "done by an arm that knows no streams"})

    coder = Starlette(routes=[Route("/execute", plain, methods=["POST"])])
    async with orchestrator_kit(tmp_path, Script(), coder=coder) as orch:
        view = await orch.run({"goal": "do it"})
    assert (view.status, view.output) == ("completed", "done by an arm that knows no streams")


@pytest.mark.parametrize("handler", [never_answer, endless_stream])
async def test_an_arm_that_does_not_come_to_an_end_ends_with_the_tasks_time(tmp_path: Path, handler: Handler) -> None:
    assert (await run_with(handler, tmp_path, 2))["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("failure", "calls", "code"),
    [
        (ZeroDivisionError("after the effect"), 1, "outcome_unknown"),
        (OctoError("The model wrote no JSON.", code="model_output_invalid"), 1, "outcome_unknown"),
        (RetryStep("Nothing was paid."), 2, None),
    ],
)
async def test_an_at_most_once_step_is_attempted_again_only_if_its_arm_did_nothing(
    tmp_path: Path, script: Script, failure: Exception, calls: int, code: str | None
) -> None:
    payments: list[str] = []
    arm = Arm("payer", description="Pays")

    @arm.operation(kind="at_most_once")
    async def execute(body: Task, ctx: Context) -> ExecuteResult:
        del ctx
        payments.append(body.goal)
        if len(payments) == 1:
            raise failure
        return ExecuteResult("paid")

    del execute
    async with orchestrator_kit(tmp_path, script) as orch, enrolled(orch, arm):
        view = await orch.run({"goal": "pay", "assigned_arm": "payer", "budget": {"max_retries": 3}})
    assert len(payments) == calls
    assert (view.error and view.error.code) == code
