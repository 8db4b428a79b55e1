"""Tools over the models service: a stock client, a real service, a provider that speaks the same protocol."""

import json

import msgspec
from openai import AsyncOpenAI
from test_models_service import models_over

from octollm.testing.fake_model import ScriptedReply, ScriptedRequest

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLED = ScriptedReply(
    tool_calls=(("weather", '{"city": "Bonn"}'), ("weather", '{"city": "Kiel"}')), finish_reason="tool_calls"
)


def two_turns(asked: ScriptedRequest) -> ScriptedReply | str:
    return "Rain in both." if asked.messages[-1][0] == "tool" else CALLED


def client_of(harness) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=harness.urls["models"] + "/v1", api_key=harness.token("models:chat"), max_retries=0)


async def test_tools_pass_through_both_ways(tmp_path):
    async with models_over(two_turns, tmp_path) as (harness, provider), client_of(harness) as client:
        messages = [{"role": "user", "content": "Rain?"}]
        answer = await client.chat.completions.create(
            model="default", messages=messages, tools=[WEATHER], tool_choice="auto", parallel_tool_calls=True
        )
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [("call-0", "weather", '{"city": "Bonn"}'), ("call-1", "weather", '{"city": "Kiel"}')]
        raw = provider.requests[0].raw
        assert (raw["tools"], raw["tool_choice"], raw["parallel_tool_calls"]) == ([WEATHER], "auto", True)

        messages.append(choice.message.model_dump(exclude_none=True))
        messages += [{"role": "tool", "tool_call_id": call_id, "content": "rain"} for call_id, _, _ in calls]
        answer = await client.chat.completions.create(model="default", messages=messages, tools=[WEATHER])
        assert answer.choices[0].message.content == "Rain in both."
        assert answer.choices[0].message.tool_calls is None
        sent = provider.requests[1].raw["messages"]
        assert [message.get("tool_call_id") for message in sent[2:]] == ["call-0", "call-1"]
        assert [call["id"] for call in sent[1]["tool_calls"]] == ["call-0", "call-1"]


async def test_a_streamed_answer_carries_its_calls(tmp_path):
    async with models_over(two_turns, tmp_path) as (harness, _provider), client_of(harness) as client:
        stream = await client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "Rain?"}], tools=[WEATHER], stream=True
        )
        found, finish = {}, None
        async for chunk in stream:
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                for call in choice.delta.tool_calls or ():
                    found[call.index] = (call.function.name, json.loads(call.function.arguments))
        assert found == {0: ("weather", {"city": "Bonn"}), 1: ("weather", {"city": "Kiel"})}
        assert finish == "tool_calls"


async def test_a_repeat_is_answered_with_the_same_calls(tmp_path):
    async with models_over(two_turns, tmp_path) as (harness, provider):
        body = {"model": "default", "messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER]}
        token, key = harness.token("models:chat"), {"Idempotency-Key": "k1"}
        first, again = [
            msgspec.json.decode(
                (await harness.send("models", "POST", "/v1/chat/completions", token=token, body=body, headers=key)).body
            )
            for _ in range(2)
        ]
        assert again["choices"] == first["choices"]
        assert len(provider.requests) == 1


async def test_the_tools_count_in_the_prompt(tmp_path):
    async with models_over(two_turns, tmp_path) as (harness, _provider), client_of(harness) as client:
        messages = [{"role": "user", "content": "Rain?"}]
        for more in ({}, {"tools": [WEATHER]}):
            await client.chat.completions.create(model="default", messages=messages, **more)
        plain, with_tools = [wanted.prompt_tokens for wanted in harness.records.reserved]
        assert with_tools >= plain + len(json.dumps(WEATHER, separators=(",", ":")))
