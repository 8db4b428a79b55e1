"""The five arms over real HTTP with real tokens; only the model and the orchestrator are fakes."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octollm.capability import ScopeSet
from octollm.config import read_settings
from octollm.contracts.operations import AcceptResult, ExternalResponse, RunResult, SearchResult, ValidateResult
from octollm.contracts.problems import Problem
from octollm.contracts.services import SERVICES
from octollm.contracts.stream import NDJSON, StreamEvent
from octollm.contracts.task import ExecuteResult, Plan
from octollm.errors import OctoError
from octollm.rpc.http_client import HttpResponse
from octollm.rpc.transport import listen, serve_app
from octollm.services.arms.coder.service import coder_service
from octollm.services.arms.executor.sandbox import Sandbox
from octollm.services.arms.executor.service import executor_service
from octollm.services.arms.judge.service import judge_service
from octollm.services.arms.planner.service import planner_service
from octollm.services.arms.retriever.service import retriever_service
from octollm.services.memory.service import memory_service
from octollm.services.models.service import models_service
from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedModel, ScriptedReply, ScriptedRequest, scripted_model
from octollm.testing.harness import Harness, start_harness

SALES = "month,amount\n2024-01,10.5\n2024-02,20.25\n2024-03,30\n"
GUIDE = "# Billing\n\nThe billing service exports invoices every night at 02:00.\n"
DOUBLE = "```python\ndef double(x: int) -> int:\n    '''Return twice x.'''\n    return x + x\n```"
DOUBLE_TOO = "```python\ndef double(x: int) -> int:\n    '''Return twice x.'''\n    return 2 * x\n```"
EXAMPLES = "\n".join(f"assert double({n}) == {2 * n}" for n in (1, 2, 3, 10, -4, 0))

NOTHING: Mapping[str, str] = {}

Answers = Callable[[ScriptedRequest], str | ScriptedReply]


class ArmsKit:
    """All five arms, with memory and models behind them."""

    def __init__(self, harness: Harness, model: ScriptedModel) -> None:
        self.harness = harness
        self.model = model

    async def post(self, service: str, operation: str, body: object, **more: Any) -> HttpResponse:
        token = more.pop("token", None) or self.harness.token(f"{service}:{operation}", **more.pop("claims", {}))
        return await self.harness.send(service, "POST", f"/{operation}", token=token, body=body, **more)


@contextlib.asynccontextmanager
async def open_arms(
    tmp_path, answers: Answers, *only: str, sandbox: Sandbox | None = None, environment: Mapping[str, str] = NOTHING
) -> AsyncIterator[ArmsKit]:
    async with contextlib.AsyncExitStack() as stack:
        model = await stack.enter_async_context(scripted_model(answers))
        harness = await stack.enter_async_context(start_harness())
        environment = {
            **environment,
            "OCTOLLM_HOME": str(tmp_path),
            "OCTOLLM_MODEL": "openai:scripted",
            "OCTOLLM_MODEL_URL": model.url,
        }
        settings = read_settings(environment, ())

        async def get_sandbox() -> Sandbox:
            if sandbox is None:
                raise OctoError("No sandbox works here: install bubblewrap.", code="no_sandbox")
            return sandbox

        openings: dict[str, Any] = {
            "memory": memory_service,
            "models": models_service,
            "planner": planner_service,
            "executor": lambda base, settings: executor_service(base, settings, select=get_sandbox),
            "coder": coder_service,
            "judge": judge_service,
            "retriever": retriever_service,
        }
        for name, opening in openings.items():
            if not only or name in only:
                await stack.enter_async_context(harness.serve(opening(harness.base(name), settings)))
        yield ArmsKit(harness, model)


def unexpected_request(asked: ScriptedRequest) -> str:
    raise AssertionError(f"nobody should ask the model: {asked.last}")


def decode_answer(answer: HttpResponse, kind: Any) -> Any:
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body, type=kind)


def problem(answer: HttpResponse) -> Problem:
    return msgspec.json.decode(answer.body, type=Problem)


def lines(body: bytes) -> list[StreamEvent]:
    return [msgspec.json.decode(line, type=StreamEvent) for line in body.splitlines()]


def text_file(name: str, text: str) -> dict[str, str]:
    return {"name": name, "text": text}


def coding(asked: ScriptedRequest) -> str:
    if "test cases" in asked.system:
        return EXAMPLES
    return DOUBLE if asked.raw["seed"] == 0 else DOUBLE_TOO


# The ADR's own clients


async def test_the_adrs_call_of_the_coder_works(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, coding, sandbox=bubblewrap) as arms:
        body = {
            "task_id": "task-123",
            "goal": "Write a function double(x) that doubles a number.",
            "context": {},
            "constraints": [],
            "priority": 5,
            "colour": "unknown fields are passed over",
        }
        answer = await arms.post("coder", "execute", body, headers={"X-Request-ID": "req-abc"})
        assert answer.headers["x-request-id"] == "req-abc"
        assert "def double" in msgspec.json.decode(answer.body)["output"]
        result = decode_answer(answer, ExecuteResult)
        assert [a.name for a in result.artifacts] == ["double.py", "test_double.py"]
        assert result.evidence.kind == "code"
        assert {"syntax", "lint", "tests"} <= {check.name for check in result.evidence.checks if check.passed}
        assert result.usage.total_tokens > 0
        stored = arms.harness.records.files
        assert b"def double" in stored[result.artifacts[0].digest]
        assert all(hashlib.sha256(body).hexdigest() == digest for digest, body in stored.items())


async def test_the_adrs_call_of_the_judge_works(tmp_path) -> None:
    async with open_arms(tmp_path, unexpected_request, "judge") as arms:
        answer = await arms.post("judge", "validate", {"code": "def f():\n    return 1\n", "language": "python"})
        assert msgspec.json.decode(answer.body)["is_valid"] is True
        answer = await arms.post("judge", "validate", {"code": "def f(:\n", "language": "python"})
        verdict = decode_answer(answer, ValidateResult)
        assert not verdict.is_valid
        assert verdict.reasons


# Coder


async def test_the_coders_stream_tells_the_code_as_it_is_written(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, coding, sandbox=bubblewrap) as arms:
        body = {"goal": "Write a function double(x) that doubles a number."}
        answer = await arms.post("coder", "execute", body, headers={"Accept": NDJSON})
        found = lines(answer.body)
        assert found[-1].type == "result"
        tokens = [line for line in found if line.type == "token"]
        standing = ""
        for token in tokens:
            standing = token.text if token.reset else standing + token.text
        assert not tokens[0].reset
        assert standing in (DOUBLE, DOUBLE_TOO)


async def test_a_question_over_tables_is_answered_by_a_query(tmp_path, bubblewrap) -> None:
    def answers(asked: ScriptedRequest) -> str:
        return "SELECT sum(amount) AS total FROM sales"

    async with open_arms(tmp_path, answers, sandbox=bubblewrap) as arms:
        arms.harness.records.files[hashlib.sha256(SALES.encode()).hexdigest()] = SALES.encode()
        files = [{"name": "sales.csv", "digest": hashlib.sha256(SALES.encode()).hexdigest()}]
        answer = await arms.post(
            "coder", "execute", {"goal": "What do all the amounts add up to?", "context": {"files": files}}
        )
        result = decode_answer(answer, ExecuteResult)
        assert "total: 60.75" in result.output
        assert (result.evidence.kind, result.evidence.rows) == ("data", 1)

        accept = {"goal": "What do all the amounts add up to?", "result": msgspec.to_builtins(result), "files": files}
        verdict = decode_answer(await arms.post("judge", "accept", accept), AcceptResult)
        assert verdict.accepted, verdict
        forged = {**accept, "result": {**accept["result"], "output": result.output.replace("60.75", "99")}}
        assert not decode_answer(await arms.post("judge", "accept", forged), AcceptResult).accepted


async def test_plain_text_is_marked_as_unchecked(tmp_path) -> None:
    async with open_arms(tmp_path, lambda asked: f"Heard: {asked.last}", "models", "coder") as arms:
        body = {
            "goal": "Explain why the sky is blue.",
            "context": {"text": "Be short.", "inputs": {"s1": "Light scatters."}},
            "constraints": ["In German."],
        }
        result = decode_answer(await arms.post("coder", "execute", body), ExecuteResult)
        assert "Light scatters." in result.output
        assert "In German." in result.output
        assert result.evidence.checks[0].passed is False


@pytest.mark.parametrize(
    ("reasons", "code"),
    [
        (("length", "length"), "model_output_truncated"),
        (("content_filter",), "model_output_filtered"),
        (("length", "content_filter"), "model_output_filtered"),
        (("length", "stop"), ""),
    ],
)
async def test_half_an_answer_is_no_result(tmp_path, reasons: tuple[str, ...], code: str) -> None:
    rest = iter(reasons)

    def answer(_asked: ScriptedRequest) -> ScriptedReply:
        reason = next(rest)
        return ScriptedReply("Light scatters." if reason == "stop" else "Light scat", finish_reason=reason)

    async with open_arms(tmp_path, answer, "models", "coder") as arms:
        got = await arms.post("coder", "execute", {"goal": "Explain why the sky is blue."})
        limits = [asked.raw["max_completion_tokens"] for asked in arms.model.requests]
        assert limits == sorted(limits)
        assert len(set(limits)) == len(reasons)
        if code:
            assert problem(got).code == code
        else:
            assert decode_answer(got, ExecuteResult).output == "Light scatters."


async def test_an_empty_goal_is_refused(tmp_path) -> None:
    async with open_arms(tmp_path, unexpected_request, "coder") as arms:
        answer = await arms.post("coder", "execute", {"goal": "  "})
        assert (answer.status, problem(answer).code) == (400, "goal_invalid")
        assert problem(await arms.post("coder", "execute", {})).code == "invalid_body"


async def test_a_repeat_with_a_key_does_the_work_once(tmp_path) -> None:
    async with open_arms(tmp_path, lambda _: "An answer.", "models", "coder") as arms:
        body, key = {"goal": "Explain tides."}, {"Idempotency-Key": "task-1:s1:1"}
        first = await arms.post("coder", "execute", body, headers=key)
        again = await arms.post("coder", "execute", body, headers=key)
        assert again.body == first.body
        assert again.headers["idempotent-replayed"] == "true"
        assert len(arms.model.requests) == 1
        conflict = await arms.post("coder", "execute", {"goal": "Explain waves."}, headers=key)
        assert problem(conflict).code == "idempotency_conflict"


async def test_closing_the_connection_stops_the_model_over_two_hops(tmp_path) -> None:
    async with open_arms(tmp_path, lambda _: ScriptedReply("Once upon", hangs=True), "models", "coder") as arms:
        asking = asyncio.create_task(arms.post("coder", "execute", {"goal": "Explain tides."}))
        await wait_until(lambda: arms.model.active, description="the model writes")
        asking.cancel()
        await wait_until(lambda: arms.model.disconnects == 1, description="the provider sees its client leave")
        await wait_until(lambda: arms.harness.records.settled, description="the call is settled")


async def test_a_failure_of_the_model_is_told_as_it_is(tmp_path) -> None:
    async with open_arms(tmp_path, lambda _: ScriptedReply(error_status=401), "models", "coder") as arms:
        answer = await arms.post("coder", "execute", {"goal": "Explain tides."})
        assert (answer.status, problem(answer).code, problem(answer).retryable) == (503, "model_failed", False)


async def test_an_exhausted_budget_is_told_as_it_is(tmp_path) -> None:
    async with open_arms(tmp_path, unexpected_request, "models", "coder") as arms:
        arms.harness.records.tokens = 5
        answer = await arms.post("coder", "execute", {"goal": "Explain tides."})
        assert (answer.status, problem(answer).code) == (403, "budget_exhausted")


# Judge


async def test_the_judge_runs_tests_with_the_executor(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, unexpected_request, sandbox=bubblewrap) as arms:
        tests = (
            "import unittest\nfrom solution import f\n\n\nclass T(unittest.TestCase):\n"
            "    def test_f(self):\n        self.assertEqual(f(1), 2)\n"
        )
        good = {"code": "def f(x):\n    return x + 1\n", "tests": tests}
        bad = {"code": "def f(x):\n    return x + 2\n", "tests": tests}
        assert decode_answer(await arms.post("judge", "validate", good), ValidateResult).is_valid
        verdict = decode_answer(await arms.post("judge", "validate", bad), ValidateResult)
        assert not verdict.is_valid
        assert "expected 2, got 3" in verdict.reasons[0]


async def test_the_judge_cannot_run_what_its_caller_may_not(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, unexpected_request, sandbox=bubblewrap) as arms:
        body = {"code": "x = 1\n", "tests": "import unittest\n"}
        claims = {"authority": ScopeSet.parse("judge:validate")}
        answer = await arms.post("judge", "validate", body, claims=claims)
        assert (answer.status, problem(answer).code) == (403, "authority_missing")


async def test_the_judge_checks_the_files_of_a_task(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, unexpected_request, sandbox=bubblewrap) as arms:
        tests = (
            "import unittest\nfrom calc import add\n\n\nclass T(unittest.TestCase):\n"
            "    def test_add(self):\n        self.assertEqual(add(1, 1), 3)\n"
        )
        files = [text_file("calc.py", "def add(a, b):\n    return a + b\n"), text_file("test_calc.py", tests)]
        answer = await arms.post("judge", "execute", {"goal": "check", "context": {"files": files}})
        result = decode_answer(answer, ExecuteResult)
        assert result.output.startswith("calc.py: not valid")
        none = await arms.post("judge", "execute", {"goal": "check"})
        assert problem(none).code == "file_invalid"


async def test_a_text_is_judged_by_a_capable_model(tmp_path) -> None:
    verdict = '{"reason": "It is off the point.", "accepted": false}'
    async with open_arms(tmp_path, lambda _: verdict, "models", "judge") as arms:
        result = {"output": "Bananas.", "evidence": {"kind": "text"}}
        answer = await arms.post("judge", "accept", {"goal": "Explain tides.", "result": result})
        assert decode_answer(answer, AcceptResult).reasons == ("It is off the point.",)


# Executor


async def test_a_program_is_run_and_what_it_made_is_stored(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, unexpected_request, "executor", sandbox=bubblewrap) as arms:
        program = "print('hello')\nopen('made.txt', 'w').write('made')\n"
        context = {"files": [text_file("main.py", program), text_file("helper.py", "x = 1\n")]}
        result = decode_answer(
            await arms.post("executor", "execute", {"goal": "run", "context": context}), ExecuteResult
        )
        assert result.output == "hello"
        assert [a.name for a in result.artifacts] == ["made.txt"]
        assert arms.harness.records.files[result.artifacts[0].digest] == b"made"
        ready = msgspec.json.decode((await arms.harness.send("executor", "GET", "/ready")).body)
        assert ready["dependencies"]["sandbox"].pop("latency_ms") >= 0
        assert ready["dependencies"]["sandbox"] == {"ok": True, "detail": "bubblewrap", "required": False}
        metrics = (await arms.harness.send("executor", "GET", "/metrics")).body.decode()
        assert 'octollm_sandbox_runs_total{language="python",outcome="ok"} 1.0' in metrics


async def test_a_query_is_run(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, unexpected_request, "executor", sandbox=bubblewrap) as arms:
        context = {"files": [text_file("sales.csv", SALES), text_file("q.sql", "SELECT max(amount) AS top FROM sales")]}
        result = decode_answer(
            await arms.post("executor", "execute", {"goal": "run", "context": context}), ExecuteResult
        )
        assert "top: 30" in result.output
        assert result.evidence.kind == "data"


async def test_a_program_that_fails_is_no_result(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, unexpected_request, "executor", sandbox=bubblewrap) as arms:
        context = {"files": [text_file("main.py", "raise SystemExit('no luck')\n")]}
        answer = await arms.post("executor", "execute", {"goal": "run", "context": context})
        assert (answer.status, problem(answer).code) == (409, "not_accepted")
        assert "no luck" in problem(answer).detail


@pytest.mark.parametrize("names", [[], ["a.py", "b.py"], ["notes.txt"], ["a.sql", "b.sql"]])
async def test_it_must_be_plain_what_to_run(tmp_path, names: list[str]) -> None:
    async with open_arms(tmp_path, unexpected_request, "executor") as arms:
        context = {"files": [text_file(name, "x") for name in names]}
        answer = await arms.post("executor", "execute", {"goal": "run", "context": context})
        assert (answer.status, problem(answer).code) == (400, "file_invalid")


async def test_a_run_reads_only_files_that_its_caller_may_read(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, unexpected_request, "executor", sandbox=bubblewrap) as arms:
        secret = hashlib.sha256(b"secret").hexdigest()
        arms.harness.records.files[secret] = b"secret"
        body = {
            "language": "python",
            "command": ["-c", "print(open('s.txt').read())"],
            "files": [{"name": "s.txt", "digest": secret}],
        }
        allowed = decode_answer(await arms.post("executor", "run", body), RunResult)
        assert (allowed.stdout, allowed.sandbox) == ("secret\n", "bubblewrap")
        claims = {"authority": ScopeSet.parse(f"executor:run files:read:{'0' * 64}")}
        answer = await arms.post("executor", "run", body, claims=claims)
        assert (answer.status, problem(answer).code) == (403, "authority_missing")


async def test_without_a_sandbox_the_executor_says_how_to_get_one(tmp_path) -> None:
    async with open_arms(tmp_path, unexpected_request, "executor") as arms:
        body = {"language": "python", "command": ["-c", "print(1)"]}
        answer = await arms.post("executor", "run", body)
        assert (answer.status, problem(answer).code) == (503, "no_sandbox")
        assert "install bubblewrap" in problem(answer).detail
        ready = msgspec.json.decode((await arms.harness.send("executor", "GET", "/ready")).body)
        assert (ready["status"], ready["dependencies"]["sandbox"]["ok"]) == ("degraded", False)


# Requests to external servers


class ExternalServer:
    """An external server on loopback, which records what it got."""

    def __init__(self) -> None:
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.url = ""
        self.response: Response = Response(b"hello", 200, {"X-Answer": "yes"})

    async def respond(self, request: Request) -> Response:
        self.heads.append(dict(request.headers))
        self.bodies.append(await request.body())
        return self.response


@pytest.fixture
async def external_server() -> AsyncIterator[ExternalServer]:
    server = ExternalServer()
    app = Starlette(routes=[Route("/{path:path}", server.respond, methods=["GET", "POST", "PUT", "DELETE"])])
    bound = listen("127.0.0.1", 0, "external server")
    server.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    async with serve_app(app, bound):
        yield server


def allowed(external_server: ExternalServer, *hosts: str) -> dict[str, str]:
    return {"OCTOLLM_EGRESS_ORIGINS": external_server.url, "OCTOLLM_HTTP_ALLOWLIST": ",".join(hosts)}


@pytest.mark.parametrize("hosts", [[], ["other/127.0.0.1"], ["default/example.com"]])
async def test_no_host_may_be_called_unless_the_tenant_s_list_has_it(
    tmp_path, external_server, hosts: list[str]
) -> None:
    async with open_arms(
        tmp_path, unexpected_request, "executor", environment=allowed(external_server, *hosts)
    ) as arms:
        answer = await arms.post("executor", "http", {"method": "GET", "url": external_server.url + "/"})
        assert (answer.status, problem(answer).code) == (403, "host_not_allowed")
        assert "OCTOLLM_HTTP_ALLOWLIST" in problem(answer).detail
        assert external_server.heads == []


async def test_a_host_on_the_list_is_called_with_a_key_of_the_effect(tmp_path, external_server) -> None:
    async with open_arms(
        tmp_path, unexpected_request, "executor", environment=allowed(external_server, "default/127.0.0.1")
    ) as arms:
        body = {"method": "POST", "url": external_server.url + "/orders?x=1", "headers": {"X-Mine": "1"}, "body": "{}"}
        answer = decode_answer(
            await arms.post("executor", "http", body, headers={"Idempotency-Key": "order-1"}), ExternalResponse
        )
        assert (answer.status, answer.body, answer.encoding) == (200, "hello", "utf-8")
        assert answer.headers["x-answer"] == "yes"
        # At most once: the repeat gets the stored response, and the server no second request.
        assert (
            decode_answer(
                await arms.post("executor", "http", body, headers={"Idempotency-Key": "order-1"}), ExternalResponse
            )
            == answer
        )
        assert external_server.bodies == [b"{}"]
        assert external_server.heads[0]["x-mine"] == "1"
        assert len(external_server.heads[0]["idempotency-key"]) == 64
        external_server.response = Response(b"\xff\xfe", 302, {"Location": "http://169.254.169.254/"})
        answer = decode_answer(
            await arms.post("executor", "http", {"method": "GET", "url": external_server.url}), ExternalResponse
        )
        assert (answer.status, answer.body, answer.encoding) == (302, "//4=", "base64")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"url": "http://localhost:1/"}, 403, "url_refused"),
        ({"url": "https://169.254.169.254/latest/meta-data/"}, 403, "url_refused"),
        ({"url": "https://2130706433/"}, 403, "url_refused"),
        ({"method": "CONNECT"}, 400, "invalid_body"),
        ({"method": "TRACE"}, 400, "invalid_body"),
        ({"method": "GET / HTTP/1.1\r\nX: y"}, 400, "invalid_body"),
        ({"headers": {"Host": "inside"}}, 400, "invalid_body"),
        ({"headers": {"Transfer-Encoding": "chunked"}}, 400, "invalid_body"),
        ({"headers": {"Proxy-Authorization": "x"}}, 400, "invalid_body"),
        ({"headers": {"X-A": "1\r\nX-B: 2"}}, 400, "invalid_body"),
        ({"headers": {"X A": "1"}}, 400, "invalid_body"),
        ({"headers": {"X-A": "1", "x-a": "2"}}, 400, "invalid_body"),
        ({"headers": {f"X-{number}": "1" for number in range(65)}}, 400, "invalid_body"),
    ],
)
async def test_a_request_that_leads_inside_or_is_malformed_is_refused(
    tmp_path, external_server, change: dict[str, Any], status: int, code: str
) -> None:
    async with open_arms(
        tmp_path, unexpected_request, "executor", environment=allowed(external_server, "default/127.0.0.1")
    ) as arms:
        body = {"method": "GET", "url": external_server.url + "/", **change}
        answer = await arms.post("executor", "http", body)
        assert (answer.status, problem(answer).code) == (status, code)
        assert external_server.heads == []


# Planner


async def test_a_goal_becomes_a_plan(tmp_path) -> None:
    async with open_arms(tmp_path, lambda _: "no JSON at all", "models", "planner") as arms:
        body = {
            "goal": "What is the total amount?",
            "context": {"files": [text_file("sales.csv", SALES)]},
            "arms": [{"name": name, "description": name} for name in ("coder", "retriever")],
        }
        plan = decode_answer(await arms.post("planner", "plan", body), Plan)
        assert [(step.arm, step.files) for step in plan.steps] == [("coder", ("sales.csv",))]
        assert plan.usage.total_tokens > 0


async def test_the_planner_runs_its_programs_with_the_executor(tmp_path, bubblewrap) -> None:
    programs = '{"programs": [{"title": "Add up", "program": "print(1 + 1)"}]}'
    async with open_arms(tmp_path, lambda _: programs, sandbox=bubblewrap) as arms:
        result = decode_answer(await arms.post("planner", "execute", {"goal": "Add 1 and 1"}), ExecuteResult)
        assert result.output == "1. Add up\n2"


# Retriever


async def remember(arms: ArmsKit, text: str, name: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    body = {"name": name, "text": text, "digest": digest}
    token = arms.harness.token("memory:write")
    answer = await arms.harness.send("memory", "POST", "/documents", token=token, body=body)
    assert answer.status in (200, 201)
    return digest


async def test_a_question_is_answered_with_its_lines(tmp_path) -> None:
    async with open_arms(tmp_path, lambda _: "It exports invoices at 02:00.", "memory", "models", "retriever") as arms:
        digest = await remember(arms, GUIDE, "renamed-elsewhere.md")
        goal = "When does the billing service export invoices?"
        files = [{"name": "guide.md", "digest": digest}]
        result = decode_answer(
            await arms.post("retriever", "execute", {"goal": goal, "context": {"files": files}}), ExecuteResult
        )
        assert [(c.file, c.line_start) for c in result.evidence.citations] == [("guide.md", 3)]
        in_place = [text_file("guide.md", GUIDE)]
        again = decode_answer(
            await arms.post("retriever", "execute", {"goal": goal, "context": {"files": in_place}}), ExecuteResult
        )
        assert again.evidence.citations == result.evidence.citations


async def test_passages_are_found_for_other_arms(tmp_path) -> None:
    async with open_arms(tmp_path, unexpected_request, "memory", "retriever") as arms:
        await remember(arms, GUIDE, "guide.md")
        found = decode_answer(await arms.post("retriever", "search", {"query": "invoices"}), SearchResult)
        assert [passage.source for passage in found.passages] == ["guide.md"]
        tenant = {"tenant": "other"}
        assert decode_answer(
            await arms.post("retriever", "search", {"query": "invoices"}, claims=tenant), SearchResult
        ) == (SearchResult(()))


async def test_what_is_not_there_is_not_found(tmp_path) -> None:
    async with open_arms(tmp_path, unexpected_request, "memory", "models", "retriever") as arms:
        result = decode_answer(
            await arms.post("retriever", "execute", {"goal": "Who is the queen of Denmark?"}), ExecuteResult
        )
        assert not result.evidence.found


# All of them


async def test_arms_register_with_what_they_do(tmp_path, bubblewrap) -> None:
    async with open_arms(tmp_path, unexpected_request, sandbox=bubblewrap) as arms:
        records = arms.harness.records
        await wait_until(lambda: len(records.arms) == 5, description="all five arms are registered")
        assert records.arms["judge"].operations == ("validate", "accept", "execute")
        assert records.arms["coder"].accepts == ("files:tabular", "files:text", "files:none")
        for name in records.arms:
            answer = await arms.harness.send(name, "GET", "/openapi.json")
            assert answer.status == 200


ARM_OPERATIONS = [
    ("planner", "plan"),
    ("planner", "execute"),
    ("executor", "run"),
    ("executor", "execute"),
    ("executor", "http"),
    ("coder", "execute"),
    ("judge", "validate"),
    ("judge", "accept"),
    ("judge", "execute"),
    ("retriever", "search"),
    ("retriever", "execute"),
]


async def test_no_arm_works_for_the_wrong_token(tmp_path) -> None:
    async with open_arms(tmp_path, unexpected_request) as arms:
        harness = arms.harness
        for service, operation in ARM_OPERATIONS:
            other = next(name for name in ("coder", "judge") if name != service)
            replayed = harness.token(f"{other}:execute")
            for token, status, code in (
                (None, 401, "token_missing"),
                (replayed, 401, "token_invalid"),
                (harness.token(f"{service}:nothing"), 403, "scope_missing"),
                (harness.token(f"{service}:{operation}:narrower"), 403, "scope_missing"),
                (harness.token(f"{service}:{operation}")[:-3] + "abc", 401, "token_invalid"),
            ):
                answer = await harness.send(service, "POST", f"/{operation}", token=token, body={})
                found = (answer.status, problem(answer).code)
                assert found == (status, code) or (status, found[1]) == (401, "token_malformed"), (service, operation)
        assert arms.model.requests == []


async def test_a_stolen_bearer_of_a_nested_call_opens_nothing_else(tmp_path) -> None:
    stolen: list[str] = []

    async with open_arms(tmp_path, lambda _: "An answer.", "models", "coder", "judge") as arms:
        decode_answer(await arms.post("coder", "execute", {"goal": "Explain tides."}), ExecuteResult)
        stolen += [reserved.bearer for reserved in arms.harness.records.reserved]
        assert stolen
        for service, path in (("coder", "/execute"), ("judge", "/validate"), ("orchestrator", "/files")):
            answer = await arms.harness.send(service, "POST", path, token=stolen[0], body={})
            assert (answer.status, problem(answer).code) == (401, "token_invalid")
        # It opens what it was made for, at the service that it was made for, and no more than that.
        answer = await arms.harness.send("models", "POST", "/v1/embeddings", token=stolen[0], body={})
        assert (answer.status, problem(answer).code) == (403, "scope_missing")
        assert set(SERVICES) >= {"models"}
