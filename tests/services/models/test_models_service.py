import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from openai import (
    APIError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
)

from octollm.config import Settings, read_settings
from octollm.contracts.problems import Problem
from octollm.contracts.stream import NDJSON, StreamEvent
from octollm.contracts.task import Usage
from octollm.errors import OctoError
from octollm.llm.selection import ModelChoice
from octollm.llm.types import ChatMessage, ChatRequest, ChatUsage, CompletionEnd, ModelStreamChunk, TextDelta
from octollm.rpc.http_client import HttpResponse, StreamedResponse
from octollm.services.models.service import models_service
from octollm.testing import wait_until
from octollm.testing.fake_model import ModelScript, ScriptedModel, ScriptedReply, scripted_model
from octollm.testing.harness import Harness, start_harness

ASK = {"model": "default", "messages": [{"role": "user", "content": "say hello"}]}


def settings_of(tmp_path, **more: str) -> Settings:
    environment = {"OCTOLLM_HOME": str(tmp_path), "OCTOLLM_MODEL_CACHE": str(tmp_path / "none"), **more}
    return read_settings(environment, ())


@dataclass
class PiecewiseModel:
    """A model in this process that writes pieces, and waits for ``gate`` before each one after the first."""

    pieces: Sequence[str] = ("Hello", ", ", "world")
    error: OctoError | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    most: int = 0
    stopped: int = 0
    requests: list[ChatRequest] = field(default_factory=list)
    closed: bool = False
    name: str = "qwen2.5-coder-0.5b"
    context_tokens: int = 1000

    async def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        return sum(len(message.text.split()) for message in messages)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for n, piece in enumerate(self.pieces):
                if n:
                    await self.gate.wait()
                yield TextDelta(piece)
            if self.error is not None:
                raise self.error
            yield CompletionEnd("stop", ChatUsage.of(await self.count_tokens(request.messages), len(self.pieces)))
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped += 1
            raise
        finally:
            self.running -= 1

    async def aclose(self) -> None:
        self.closed = True


@contextlib.asynccontextmanager
async def models_with(model: PiecewiseModel, tmp_path) -> AsyncIterator[Harness]:
    async def open_model() -> PiecewiseModel:
        return model

    choice = ModelChoice(model.name, None, open_model)
    async with start_harness() as harness:
        opening = models_service(harness.base("models"), settings_of(tmp_path), choose=lambda: choice)
        async with harness.serve(opening):
            yield harness


@contextlib.asynccontextmanager
async def models_over(script: ModelScript, tmp_path) -> AsyncIterator[tuple[Harness, ScriptedModel]]:
    async with scripted_model(script) as provider, start_harness() as harness:
        settings = settings_of(tmp_path, OCTOLLM_MODEL="openai:scripted", OCTOLLM_MODEL_URL=provider.url)
        async with harness.serve(models_service(harness.base("models"), settings)):
            yield harness, provider


async def chat(
    harness: Harness, *, token: str | None = None, headers: dict[str, str] | None = None, **more: Any
) -> HttpResponse:
    token = harness.token("models:chat") if token is None else token
    return await harness.send(
        "models", "POST", "/v1/chat/completions", token=token, body={**ASK, **more}, headers=headers
    )


@contextlib.asynccontextmanager
async def streamed(harness: Harness, **more: Any) -> AsyncIterator[StreamedResponse]:
    headers = {"Authorization": "Bearer " + harness.token("models:chat"), "Content-Type": "application/json"}
    body = msgspec.json.encode({**ASK, "stream": True, **more})
    url = harness.urls["models"] + "/v1/chat/completions"
    async with harness.http.stream("POST", url, headers, body, seconds=60) as answer:
        yield answer


def openai_client(harness: Harness) -> AsyncOpenAI:
    token = harness.token("models:chat", lifetime=600)
    return AsyncOpenAI(base_url=harness.urls["models"] + "/v1", api_key=token, max_retries=0)


def problem(answer: HttpResponse) -> Problem:
    return msgspec.json.decode(answer.body, type=Problem)


def events(body: bytes) -> list[Any]:
    data = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [item if item == b"[DONE]" else msgspec.json.decode(item) for item in data]


def text_of(chunks: list[Any]) -> str:
    return "".join(c["delta"].get("content", "") for chunk in chunks[:-1] for c in chunk.get("choices", ()))


async def test_an_answer_in_one_piece(tmp_path) -> None:
    async with models_over(["Hello, world"], tmp_path) as (harness, provider):
        answer = await chat(harness, max_tokens=50)
        assert answer.status == 200
        body = msgspec.json.decode(answer.body)
        assert body["object"] == "chat.completion"
        assert body["choices"] == [
            {"message": {"content": "Hello, world", "role": "assistant"}, "finish_reason": "stop", "index": 0}
        ]
        assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "cost_usd": 0.0}
        assert body["model"] == "openai:scripted"
        assert provider.requests[0].raw["max_tokens"] == 50
        assert [r.max_completion_tokens for r in harness.records.reserved] == [50]
        assert harness.records.used == Usage(2, 2, 0.0)


async def test_a_streamed_answer(tmp_path) -> None:
    async with models_over(["The quick brown fox jumps over the dog"], tmp_path) as (harness, _):
        answer = await chat(harness, stream=True, stream_options={"include_usage": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        chunks = events(answer.body)
        assert chunks[-1] == b"[DONE]"
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(chunks) == "The quick brown fox jumps over the dog"
        assert chunks[-3]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-2]["choices"] == []
        assert chunks[-2]["usage"] == {
            "prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10, "cost_usd": 0.0
        }  # fmt: skip
        assert len({chunk["id"] for chunk in chunks[:-1]}) == 1


async def test_lines_in_place_of_events_for_our_own_callers(tmp_path) -> None:
    async with models_over(["The quick brown fox"], tmp_path) as (harness, _):
        answer = await chat(harness, headers={"Accept": NDJSON}, stream=True)
        found = [msgspec.json.decode(line, type=StreamEvent) for line in answer.body.splitlines()]
        assert "".join(line.text for line in found) == "The quick brown fox"
        assert msgspec.json.decode(found[-1].result)["usage"]["completion_tokens"] == 4


async def test_the_stock_client_works(tmp_path) -> None:
    async with (
        models_over(["Hello, world", "The quick brown fox"], tmp_path) as (harness, _),
        openai_client(harness) as client,
    ):
        asked: Any = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
        whole = await client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == "Hello, world"
        assert whole.usage is not None
        assert whole.usage.total_tokens == 3
        text = ""
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == "The quick brown fox"
        names = ["default", "openai:scripted", "multilingual-e5-small"]
        assert [model.id async for model in client.models.list()] == names
        with pytest.raises(PermissionDeniedError):
            await client.embeddings.create(model="x", input="y")


async def test_an_openai_client_shows_the_message_of_an_error(tmp_path) -> None:
    broken = ScriptedReply("Once upon a time", error_status=500)
    async with models_over([broken], tmp_path) as (harness, _), openai_client(harness) as client:
        asked: Any = {"model": "default", "messages": [{"role": "user", "content": "hello"}]}
        with pytest.raises(BadRequestError) as invalid:
            await client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": 7}]})
        body: Any = invalid.value.body
        assert (invalid.value.code, invalid.value.type) == ("invalid_body", "invalid_request_error")
        assert invalid.value.param == "messages[0].content"
        assert "/messages/0/content: Expected" in body["message"]
        with pytest.raises(NotFoundError) as unknown:
            await client.responses.create(model="default", input="hello")
        assert (unknown.value.code, unknown.value.type) == ("not_found", "not_found_error")
        with pytest.raises(APIError) as cut:
            async for _ in await client.chat.completions.create(**asked, stream=True):
                pass
        assert cut.value.code == "model_failed"
        assert "openai:scripted" in cut.value.message
        with pytest.raises(AuthenticationError) as stranger:
            await client.with_options(api_key="sk-wrong").models.list()
        assert stranger.value.type == "authentication_error"


async def test_an_error_is_a_problem_document_as_well(tmp_path) -> None:
    async with models_over([], tmp_path) as (harness, _):
        answer = await chat(harness, messages=[])
        document = msgspec.json.decode(answer.body)
        assert answer.headers["content-type"] == "application/problem+json"
        assert document["error"] == {
            "message": f"{document['detail']} /messages: {document['errors'][0]['detail']}",
            "type": "invalid_request_error",
            "param": "messages",
            "code": document["code"],
        }


async def test_usage_comes_only_when_asked_for(tmp_path) -> None:
    async with models_over(["Hi"], tmp_path) as (harness, _):
        answer = await chat(harness, stream=True)
        assert all("usage" not in chunk for chunk in events(answer.body)[:-1])


async def test_what_was_granted_caps_the_answer(tmp_path) -> None:
    async with models_over(["Hi", "Ho"], tmp_path) as (harness, provider):
        harness.records.tokens = 100
        await chat(harness, max_completion_tokens=4000)
        await chat(harness)
        capped, unlimited = (asked.raw["max_completion_tokens"] for asked in provider.requests)
        # The provider's tokenizer is not at hand: the prompt is bounded by its bytes.
        assert capped == 100 - harness.records.reserved[0].prompt_tokens
        assert 0 < unlimited < capped


async def test_an_exhausted_budget_refuses_before_the_model_is_asked(tmp_path) -> None:
    async with models_over(["Hi"], tmp_path) as (harness, provider):
        harness.records.tokens = 10
        for stream in (False, True):
            answer = await chat(harness, stream=stream)
            assert (answer.status, problem(answer).code) == (403, "budget_exhausted")
        assert provider.requests == []
        assert harness.records.settled == []


async def test_a_repeat_is_answered_from_the_journal_and_costs_nothing(tmp_path) -> None:
    async with models_over(["first", "second"], tmp_path) as (harness, provider):
        key = {"Idempotency-Key": "k1"}
        first = await chat(harness, headers=key)
        again = await chat(harness, headers=key)
        flowing = await chat(harness, headers=key, stream=True, stream_options={"include_usage": True})
        other = await chat(harness, headers={"Idempotency-Key": "k2"})
        assert again.body == first.body
        assert text_of(events(flowing.body)) == "first"
        assert events(flowing.body)[-2]["usage"] == msgspec.json.decode(first.body)["usage"]
        assert msgspec.json.decode(other.body)["choices"][0]["message"]["content"] == "second"
        assert len(provider.requests) == 2
        assert len(harness.records.settled) == 2


async def test_a_stock_clients_call_gets_its_key_from_the_call_that_is_served(tmp_path) -> None:
    async with models_over(["first", "second", "third", "fourth"], tmp_path) as (harness, provider):
        served = [harness.token("models:chat", call="a" * 64), harness.token("models:chat", call="a" * 64)]
        for token in served:
            await chat(harness, token=token)
        assert len(provider.requests) == 1
        await chat(harness, token=served[0], seed=7)
        assert len(provider.requests) == 2
        for _ in range(2):  # a token made by hand serves no call: each of its calls is its own
            await chat(harness)
        assert len(provider.requests) == 4
        assert len({r.key for r in harness.records.reserved}) == 4


async def test_closing_the_connection_stops_the_model_and_settles(tmp_path) -> None:
    model = PiecewiseModel()
    async with models_with(model, tmp_path) as harness:
        async with streamed(harness) as answer:
            async for chunk in answer.chunks:
                if b"Hello" in chunk:
                    break
        await wait_until(lambda: model.stopped == 1, description="the generation is stopped")
        await wait_until(lambda: harness.records.settled, description="the call is settled")
        assert model.running == 0
        assert harness.records.journal == {}
        assert harness.records.used.prompt_tokens == 2
        assert harness.records.used.completion_tokens >= 1


async def test_closing_the_connection_of_a_whole_answer_stops_the_model_too(tmp_path) -> None:
    model = PiecewiseModel()
    async with models_with(model, tmp_path) as harness:
        asking = asyncio.create_task(chat(harness))
        await wait_until(lambda: model.running, description="the model writes")
        asking.cancel()
        await wait_until(lambda: model.stopped == 1, description="the generation is stopped")
        await wait_until(lambda: harness.records.settled, description="the call is settled")


async def test_closing_the_connection_reaches_the_provider(tmp_path) -> None:
    async with models_over([ScriptedReply("Once upon a time", hangs=True)], tmp_path) as (harness, provider):
        async with streamed(harness, max_tokens=40) as answer:
            async for chunk in answer.chunks:
                if b"upon" in chunk or b"Once" in chunk:
                    break
        await wait_until(lambda: provider.disconnects == 1, description="the provider sees its client leave")
        await wait_until(lambda: harness.records.settled, description="the call is settled")
        # A provider may have gone on to the limit: settled at the upper bound.
        assert harness.records.used.completion_tokens == 40


async def test_a_call_that_is_cut_off_in_the_queue_costs_nothing(tmp_path) -> None:
    model = PiecewiseModel()
    async with models_with(model, tmp_path) as harness:
        first = asyncio.create_task(chat(harness))
        await wait_until(lambda: model.running, description="the first call has the place")
        second = asyncio.create_task(chat(harness))
        third = asyncio.create_task(chat(harness))
        second.cancel()
        model.gate.set()
        assert (await first).status == (await third).status == 200
        assert model.most == 1
        assert len(harness.records.reserved) == len(harness.records.settled) == 2


async def test_a_call_that_is_cut_off_while_it_reserves_gives_back(tmp_path) -> None:
    async with models_over(["Hi"], tmp_path) as (harness, provider):
        harness.records.reserve_event = asyncio.Event()
        asking = asyncio.create_task(chat(harness))
        await wait_until(lambda: harness.records.reserved, description="tokens are reserved")
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        harness.records.reserve_event.set()
        await wait_until(lambda: harness.records.settled, description="they are given back")
        assert harness.records.used == Usage()
        assert provider.requests == []


async def test_the_deadline_ends_an_answer(tmp_path) -> None:
    model = PiecewiseModel()
    async with models_with(model, tmp_path) as harness:
        answer = await chat(harness, headers={"X-Timeout-Ms": "300"})
        assert (answer.status, problem(answer).code) == (504, "deadline_exceeded")
        cut = await chat(harness, headers={"X-Timeout-Ms": "300"}, stream=True)
        assert cut.status == 200
        assert events(cut.body)[-1]["code"] == "deadline_exceeded"
        await wait_until(lambda: len(harness.records.settled) == 2, description="both are settled")
        assert model.running == 0


async def test_a_failure_before_the_first_word_has_its_own_status_and_costs_nothing(tmp_path) -> None:
    async with models_over([ScriptedReply(error_status=500)] * 2, tmp_path) as (harness, _):
        for stream in (False, True):
            answer = await chat(harness, stream=stream)
            assert (answer.status, problem(answer).code) == (503, "model_failed")
        await wait_until(lambda: len(harness.records.settled) == 2, description="both are settled")
        assert harness.records.used == Usage()


async def test_a_provider_that_fails_for_a_moment_is_asked_again(tmp_path) -> None:
    async with models_over([ScriptedReply(error_status=500), ScriptedReply(error_status=503), "Hi"], tmp_path) as (
        harness,
        provider,
    ):
        answer = await chat(harness)
        assert answer.status == 200
        assert len(provider.requests) == 3
        await wait_until(lambda: harness.records.settled, description="it is settled")


async def test_a_provider_that_is_down_is_left_alone_for_a_while(tmp_path) -> None:
    async with models_over(lambda _asked: ScriptedReply(error_status=500), tmp_path) as (harness, provider):
        found = [problem(await chat(harness)) for _ in range(6)]
        assert [failed.code for failed in found] == ["model_failed"] * 2 + ["unavailable"] * 4
        assert len(provider.requests) == 5
        assert all("openai:scripted" in failed.detail and provider.url in failed.detail for failed in found)


async def test_a_failure_in_mid_stream_is_the_last_event(tmp_path) -> None:
    async with models_over([ScriptedReply("Once upon a time", error_status=500)], tmp_path) as (harness, _):
        answer = await chat(harness, stream=True, max_tokens=40)
        assert answer.status == 200
        *before, last = events(answer.body)
        assert before
        assert b"[DONE]" not in before
        failed = msgspec.convert(last, Problem)
        assert (failed.code, failed.status, failed.retryable) == ("model_failed", 503, True)
        assert failed.request_id == answer.headers["x-request-id"]
        await wait_until(lambda: harness.records.settled, description="it is settled")
        assert harness.records.used.completion_tokens == 40
        assert harness.records.journal == {}


async def test_a_crash_in_mid_stream_is_hidden(tmp_path) -> None:
    model = PiecewiseModel(error=ZeroDivisionError("secret"))  # pyright: ignore
    model.gate.set()
    async with models_with(model, tmp_path) as harness:
        answer = await chat(harness, stream=True)
        assert events(answer.body)[-1]["code"] == "internal"
        assert b"secret" not in answer.body
        whole = await chat(harness)
        assert (whole.status, problem(whole).code) == (500, "internal")


async def test_an_orchestrator_that_is_away_refuses_the_call(tmp_path) -> None:
    async with models_over(["Hi"], tmp_path) as (harness, provider):
        del harness.urls["orchestrator"]
        answer = await chat(harness)
        assert (answer.status, problem(answer).code) == (503, "unavailable")
        assert provider.requests == []


async def test_settling_goes_on_when_the_orchestrator_comes_back(tmp_path) -> None:
    model = PiecewiseModel()
    async with models_with(model, tmp_path) as harness:
        asking = asyncio.create_task(chat(harness))
        await wait_until(lambda: model.running, description="the model writes")
        url = harness.urls.pop("orchestrator")
        model.gate.set()
        await wait_until(lambda: not model.running, description="the model has ended")
        assert harness.records.settled == []
        harness.urls["orchestrator"] = url
        assert (await asking).status == 200
        await wait_until(lambda: harness.records.settled, description="the call is settled")
        assert len(harness.records.journal) == 1


async def test_without_a_model_the_service_says_how_to_get_one(tmp_path) -> None:
    async with start_harness() as harness, harness.serve(models_service(harness.base("models"), settings_of(tmp_path))):
        ready = msgspec.json.decode((await harness.send("models", "GET", "/ready")).body)
        state = ready["dependencies"]["model"]
        assert (ready["status"], state["ok"], state["required"]) == ("degraded", False, False)
        assert "octollm models pull" in state["detail"]
        for stream in (False, True):
            answer = await chat(harness, stream=stream)
            assert (answer.status, problem(answer).code) == (503, "no_model")
            assert "octollm models pull" in problem(answer).detail
        listed = await harness.send("models", "GET", "/v1/models", token=harness.token("models:chat"))
        # A model for embeddings comes with the package.
        assert [each["id"] for each in msgspec.json.decode(listed.body)["data"]] == ["multilingual-e5-small"]
        assert harness.records.reserved == []


async def test_the_first_call_waits_for_the_load_and_a_failed_load_is_told(tmp_path) -> None:
    gate, model, fail = asyncio.Event(), PiecewiseModel(), [False]
    model.gate.set()

    async def open_model() -> PiecewiseModel:
        await gate.wait()
        if fail[0]:
            raise OctoError("The model's file is damaged.", code="model_damaged")
        return model

    choice = ModelChoice("slow", None, open_model)
    async with start_harness() as harness:
        opening = models_service(harness.base("models"), settings_of(tmp_path), choose=lambda: choice)
        async with harness.serve(opening):
            ready = msgspec.json.decode((await harness.send("models", "GET", "/ready")).body)
            assert ready["dependencies"]["model"]["detail"] == "slow is loading"
            asking = asyncio.create_task(chat(harness))
            leaving = asyncio.create_task(chat(harness))
            await asyncio.wait({asking, leaving}, timeout=0.1)
            leaving.cancel()
            gate.set()
            assert (await asking).status == 200
        assert model.closed
        fail[0] = True
        opening = models_service(harness.base("models"), settings_of(tmp_path), choose=lambda: choice)
        async with harness.serve(opening):
            for _ in range(2):
                answer = await chat(harness)
                assert problem(answer).code == "model_damaged"
            ready = msgspec.json.decode((await harness.send("models", "GET", "/ready")).body)
            assert ready["dependencies"]["model"]["detail"] == "The model's file is damaged."


async def test_models_are_listed_and_others_are_refused(tmp_path) -> None:
    async with models_over(["Hi", "Ho"], tmp_path) as (harness, _):
        listed = await harness.send("models", "GET", "/v1/models", token=harness.token("models:chat"))
        names = ["default", "openai:scripted", "multilingual-e5-small"]
        assert [m["id"] for m in msgspec.json.decode(listed.body)["data"]] == names
        assert (await chat(harness, model="openai:scripted")).status == 200
        answer = await chat(harness, model="gpt-9")
        assert (answer.status, problem(answer).code) == (404, "not_found")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"max_tokens": 0},
        {"temperature": 9},
        {"response_format": {"type": "json_schema"}},
    ],
)
async def test_a_wrong_body_is_refused(tmp_path, body: dict[str, Any]) -> None:
    async with models_over([], tmp_path) as (harness, _):
        assert problem(await chat(harness, **body)).code == "invalid_body"


async def test_the_wrong_token_is_refused(tmp_path) -> None:
    async with models_over([], tmp_path) as (harness, _):
        for token, status, code in (
            (harness.token("judge:accept"), 401, "token_invalid"),
            (harness.token("models:embeddings"), 403, "scope_missing"),
            (harness.token("models:chat:small"), 403, "scope_missing"),
            ("", 401, "token_malformed"),
        ):
            answer = await chat(harness, token=token)
            assert (answer.status, problem(answer).code) == (status, code)
        assert harness.records.reserved == []


async def test_a_bearer_is_of_no_use_elsewhere(tmp_path) -> None:
    async with models_over(["Hi"], tmp_path) as (harness, _):
        token = harness.token("models:chat")
        assert (await chat(harness, token=token)).status == 200
        answer = await harness.send("orchestrator", "POST", "/files", token=token, body=b"x")
        assert (answer.status, problem(answer).code) == (401, "token_invalid")
        answer = await harness.send("orchestrator", "POST", "/budget/settle", token=token, body={})
        assert answer.status == 401


async def test_tokens_are_counted(tmp_path) -> None:
    async with models_over(["one two three"], tmp_path) as (harness, _):
        await chat(harness)
        metrics = (await harness.send("models", "GET", "/metrics")).body.decode()
        assert 'octollm_model_tokens_total{kind="prompt",model="openai:scripted"} 2.0' in metrics
        assert 'octollm_model_tokens_total{kind="completion",model="openai:scripted"} 3.0' in metrics


async def test_a_long_silence_is_filled_with_comments(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("octollm.services.models.service._KEEPALIVE_SECONDS", 0.05)
    model = PiecewiseModel(pieces=("Hello", "world"))
    async with models_with(model, tmp_path) as harness, streamed(harness) as answer:
        seen = b""
        async for chunk in answer.chunks:
            seen += chunk
            if seen.count(b": still working") >= 2:
                model.gate.set()
        assert text_of(events(seen)) == "Helloworld"
        assert events(seen)[-1] == b"[DONE]"
