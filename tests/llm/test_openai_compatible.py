import asyncio
import json
import socket
from contextlib import aclosing, asynccontextmanager

import pytest
from llm_support import serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.llm.openai_compatible import OpenAICompatibleModel, ProviderTimeouts
from octollm.llm.types import (
    ChatMessage,
    ChatRequest,
    ChatUsage,
    CompletionEnd,
    JsonSchemaFormat,
    ResponseFormat,
    TextDelta,
    bound_prompt_tokens,
)
from octollm.testing import wait_until

KEY = "sk-test-0123456789"
REQUEST = ChatRequest("ours", (ChatMessage("user", "hi"),), max_tokens=5, seed=7)


def chunk(content=None, finish=None, **members):
    choice = {"index": 0, "delta": {} if content is None else {"content": content}, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion.chunk", "choices": [choice], **members}


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11, "other": {}}}
GOOD = [chunk(""), chunk("Hel"), chunk("lo \U0001f389"), chunk(None, "stop"), USAGE]


class Provider:
    """Answers with ``events``; with ``hang`` it goes silent after them."""

    def __init__(self, events=GOOD, *, answer=None, hang=False, done=True):
        self.events, self.answer, self.hang, self.done = events, answer, hang, done
        self.bodies, self.headers = [], []
        self.gone = asyncio.Event()
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request):
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        return self.answer or StreamingResponse(self.stream(), media_type="text/event-stream")

    async def stream(self):
        for event in self.events:
            yield event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
        if self.hang:
            try:
                await asyncio.Event().wait()
            finally:
                self.gone.set()
        if self.done:
            yield "data: [DONE]\n\n"


@asynccontextmanager
async def model_of(provider, *, key=KEY, idle=5.0, path="/v1"):
    async with serving(provider.app) as url:
        model = OpenAICompatibleModel(
            "gpt-x", base_url=url + path, api_key=key, timeouts=ProviderTimeouts(connect=1, idle=idle)
        )
        try:
            yield model
        finally:
            await model.aclose()


async def answer(model, request=REQUEST):
    async with aclosing(model.stream(request)) as pieces:
        return [piece async for piece in pieces]


async def failure(provider, **options):
    async with model_of(provider, **options) as model:
        with pytest.raises(OctoError) as failed:
            await answer(model)
    assert KEY not in str(failed.value)
    return failed.value


async def test_an_answer_is_streamed_with_its_usage():
    provider = Provider()
    async with model_of(provider) as model:
        assert await answer(model) == [
            TextDelta("Hel"),
            TextDelta("lo \U0001f389"),
            CompletionEnd("stop", ChatUsage(9, 2, 11)),
        ]
        assert model.name == "openai:gpt-x"
        assert model.context_tokens == 128_000
    (body,) = provider.bodies
    assert body == {
        "model": "gpt-x",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "seed": 7,
    }
    assert provider.headers[0]["authorization"] == f"Bearer {KEY}"


async def test_every_field_that_was_given_is_passed_on():
    form = ResponseFormat("json_schema", JsonSchemaFormat({"type": "object"}, "thing", True))
    request = ChatRequest(
        "x",
        (ChatMessage("developer", "a"), ChatMessage("assistant")),
        max_completion_tokens=3,
        temperature=0.0,
        top_p=0.5,
        stop="END",
        response_format=form,
    )
    provider = Provider()
    async with model_of(provider, key=None) as model:
        await answer(model, request)
    body = provider.bodies[0]
    assert body["temperature"] == 0.0
    assert body["top_p"] == 0.5
    assert body["stop"] == ["END"]
    assert body["max_completion_tokens"] == 3
    assert body["response_format"]["json_schema"] == {"schema": {"type": "object"}, "name": "thing", "strict": True}
    assert body["messages"] == [{"role": "developer", "content": "a"}, {"role": "assistant", "content": ""}]
    assert "max_tokens" not in body
    assert "authorization" not in provider.headers[0]


@pytest.mark.parametrize(
    ("theirs", "ours"), [("length", "length"), ("content_filter", "content_filter"), ("odd", "stop")]
)
async def test_finish_reasons(theirs, ours):
    async with model_of(Provider([chunk("x", theirs), USAGE])) as model:
        assert (await answer(model))[-1].finish_reason == ours


async def test_usage_that_was_not_told_is_bounded_from_above():
    async with model_of(Provider([chunk("na\u00efve"), chunk(None, "stop")])) as model:
        final = (await answer(model))[-1]
    assert final == CompletionEnd("stop", ChatUsage.of(bound_prompt_tokens(REQUEST.messages), 6), exact=False)


async def test_the_count_is_an_upper_bound():
    model = OpenAICompatibleModel("m")
    assert await model.count_tokens([ChatMessage("user", "\u00e9" * 10)]) >= 20
    await model.aclose()


async def test_closing_the_iterator_closes_the_connection():
    provider = Provider([chunk("a")], hang=True)
    async with model_of(provider) as model:
        async with aclosing(model.stream(REQUEST)) as pieces:
            assert await anext(pieces) == TextDelta("a")
        async with asyncio.timeout(5):
            await provider.gone.wait()


async def test_cancelling_the_task_closes_the_connection():
    provider = Provider([": nothing yet\n\n"], hang=True)
    async with model_of(provider) as model:
        task = asyncio.create_task(answer(model))
        await wait_until(lambda: provider.bodies, description="the provider was asked")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await provider.gone.wait()


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_said_and_final(status):
    error = await failure(Provider(answer=JSONResponse({"error": {"message": f"bad key {KEY}"}}, status)))
    assert error.code == "model_failed"
    assert f"HTTP {status}, the key was rejected" in error.detail
    assert "openai:gpt-x" in error.detail
    assert not to_problem(error).retryable


async def test_a_key_that_is_missing_is_said():
    error = await failure(Provider(answer=Response(status_code=401)), key=None)
    assert "a key is required" in error.detail


async def test_too_many_requests_says_when_to_come_back():
    error = await failure(Provider(answer=JSONResponse({"error": {"message": "slow"}}, 429, {"retry-after": "7"})))
    assert error.retry_after == 7.0
    assert "429" in error.detail
    assert to_problem(error).retryable


@pytest.mark.parametrize("value", ["Wed, 21 Oct 2026 07:28:00 GMT", "", "nan"])
async def test_a_retry_after_that_is_no_number_is_passed_over(value):
    error = await failure(Provider(answer=Response(status_code=429, headers={"retry-after": value})))
    assert error.retry_after is None


@pytest.mark.parametrize(("status", "retryable"), [(400, False), (404, False), (408, True), (500, True), (503, True)])
async def test_other_statuses_say_what_the_provider_said(status, retryable):
    provider = Provider(answer=JSONResponse({"error": {"message": f"because\n of {KEY}", "code": 3}}, status))
    error = await failure(provider)
    assert f"HTTP {status}: because of [key]" in error.detail
    assert to_problem(error).retryable is retryable
    assert to_problem(error).code == "model_failed"
    assert len(provider.bodies) == 1  # nothing is retried here


@pytest.mark.parametrize("body", ["", "<html>", "[]", '{"error": "text"}', "x" * 200_000])
async def test_an_error_in_no_known_form_is_only_its_status(body):
    error = await failure(Provider(answer=Response(body, 502)))
    assert error.detail.endswith("HTTP 502.")


async def test_a_prompt_that_does_not_fit_has_its_own_code():
    body = {"error": {"message": "maximum context length is 8192 tokens", "code": "context_length_exceeded"}}
    error = await failure(Provider(answer=JSONResponse(body, 400)))
    assert error.code == "context_too_long"
    assert "8192" in error.detail


async def test_a_redirect_is_not_followed():
    error = await failure(Provider(answer=RedirectResponse("https://elsewhere.example/")))
    assert "redirect" in error.detail


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([chunk("a")], "broke before the response was complete"),
        (["data: {\n\n"], "not a stream"),
        ([f"data: {'x' * 2_000_000}\n\n"], "not a stream"),
        ([{"error": {"message": "out of memory", "code": 500}}], "out of memory"),
    ],
)
async def test_a_stream_that_goes_wrong(events, why):
    error = await failure(Provider(events))
    assert error.code == "model_failed"
    assert why in error.detail


async def test_a_connection_that_breaks_midway():
    async def broken(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\ndata: ")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(broken, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        model = OpenAICompatibleModel("m", base_url=f"http://127.0.0.1:{port}/v1")
        with pytest.raises(OctoError, match="broke before the response was complete"):
            await answer(model)
        await model.aclose()


async def test_silence_is_bounded():
    error = await failure(Provider([chunk("a")], hang=True), idle=0.2)
    assert "no response for" in error.detail


async def test_a_server_that_is_not_there_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        model = OpenAICompatibleModel("m", base_url=url, api_key=KEY)
        with pytest.raises(OctoError, match=url) as failed:
            await answer(model)
        await model.aclose()
    assert failed.value.code == "model_failed"
    assert KEY not in str(failed.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "https://", "https://me:sk-1@host/v1"])
def test_a_wrong_url_is_refused(url):
    with pytest.raises(OctoError) as failed:
        OpenAICompatibleModel("m", base_url=url)
    assert failed.value.code == "setting_invalid"
    assert "sk-1" not in str(failed.value)


def test_a_key_that_cannot_be_one_is_refused_without_being_shown():
    with pytest.raises(OctoError) as failed:
        OpenAICompatibleModel("m", api_key="sk-1\nevil: header")
    assert failed.value.code == "setting_invalid"
    assert "sk-1" not in str(failed.value)
