import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.llm.types import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChatUsage,
    ChunkChoice,
    CompletionMessage,
    bound_prompt_tokens,
)


def decode(**members):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **members}
    return msgspec.json.decode(msgspec.json.encode(body), type=ChatRequest)


def test_a_stock_request_is_read_and_what_is_not_known_is_ignored():
    request = decode(
        messages=[
            {"role": "system", "content": "be short", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None},
        ],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=10,
        temperature=0.5,
        top_p=1,
        seed=-3,
        stop="\n",
        user="someone",
        tools=[],
        n=1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
    )
    assert [message.text for message in request.messages] == ["be short", "ab", ""]
    assert request.stops == ("\n",)
    assert request.completion_limit == 10
    assert request.response_format.json_schema.schema == {"type": "object"}
    assert msgspec.json.decode(msgspec.json.encode(request), type=ChatRequest) == request


def test_the_newer_limit_wins():
    assert decode(max_tokens=10, max_completion_tokens=5).completion_limit == 5
    assert decode().completion_limit is None
    assert decode(stop=["a", "b"]).stops == ("a", "b")


@pytest.mark.parametrize(
    "members",
    [
        {"messages": []},
        {"messages": [{"role": "stranger", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"max_tokens": 0},
        {"temperature": 3},
        {"top_p": 0},
        {"stop": ["x"] * 17},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
        {"response_format": {"type": "xml"}},
    ],
)
def test_what_is_wrong_is_refused(members):
    with pytest.raises(msgspec.ValidationError):
        decode(**members)


def test_answers_have_the_shape_that_stock_clients_read():
    usage = ChatUsage.of(3, 4)
    whole = ChatCompletion("id", 1, "m", (ChatChoice(CompletionMessage("hi"), "stop"),), usage)
    assert msgspec.to_builtins(whole) == {
        "id": "id",
        "created": 1,
        "model": "m",
        "object": "chat.completion",
        "choices": ({"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"},),
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    chunk = ChatChunk("id", 1, "m", (ChunkChoice(ChatDelta(content="h")),))
    assert msgspec.to_builtins(chunk) == {
        "id": "id",
        "created": 1,
        "model": "m",
        "object": "chat.completion.chunk",
        "choices": ({"index": 0, "delta": {"content": "h"}, "finish_reason": None},),
    }
    last = ChatChunk("id", 1, "m", (), usage)
    assert msgspec.to_builtins(last)["usage"]["total_tokens"] == 7


@given(st.lists(st.text(max_size=50), min_size=1))
def test_the_bound_is_never_below_the_bytes(texts):
    assert bound_prompt_tokens([ChatMessage("user", text) for text in texts]) > sum(len(t.encode()) for t in texts)


def test_the_bound_stands_a_lone_surrogate():
    assert bound_prompt_tokens([ChatMessage("user", "\ud800")]) > 0
