"""Arms written with other people's clients: the OpenAI SDK, and Pydantic AI; budgeted like all others."""

import asyncio
import contextlib
import sys
from base64 import urlsafe_b64decode

import msgspec
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, RunContext

from octollm import Arm, Context, OctoError, Task
from octollm.arm import build_arm
from octollm.config import read_settings
from octollm.services.models.service import models_service
from octollm.testing import ArmTestClient, ToolUse, wait_until
from octollm.testing.fake_model import ScriptedReply, scripted_model
from octollm.testing.harness import start_harness

plain = Arm("plain", description="Asks with the OpenAI SDK", calls=["models:chat"])
beyond = Arm("beyond", description="Uses its key for more than it is for", calls=["models:chat"])


@plain.operation
async def execute(task: Task, ctx: Context) -> str:
    """Answer a goal."""
    endpoint = await ctx.model.endpoint()
    assert endpoint.api_key not in repr(endpoint)
    async with AsyncOpenAI(
        base_url=endpoint.base_url, api_key=endpoint.api_key, default_headers=endpoint.headers, max_retries=0
    ) as client:
        stream = await client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": task.goal}], stream=True
        )
        text = ""
        async for chunk in stream:
            for choice in chunk.choices:
                await ctx.emit(choice.delta.content or "")
                text += choice.delta.content or ""
    return text


@beyond.operation("execute")
async def misuse(task: Task, ctx: Context) -> str:
    """Try the key elsewhere."""
    endpoint = await ctx.model.endpoint()
    async with AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as client:
        await client.embeddings.create(model="default", input="x")
    return "it was let through"


async def test_the_openai_sdk_is_an_arms_client():
    async with ArmTestClient(plain, model=["Hello there"]) as client:
        result = await client.call("execute", {"goal": "Say hello"})
        assert (result.output, client.text) == ("Hello there", "Hello there")
        assert client.model.prompts == ["Say hello"]


async def test_its_key_opens_nothing_else():
    async with ArmTestClient(beyond) as client:
        with pytest.raises(OctoError) as caught:
            await client.call("execute", {"goal": "x"})
        assert caught.value.code == "scope_missing"
        assert client.model.requests == []


async def test_the_sdks_errors_keep_their_code():
    async with ArmTestClient(plain, model=["never"], max_tokens=1) as client:
        with pytest.raises(OctoError) as caught:
            await client.call("execute", {"goal": "Say hello"})
        assert caught.value.code == "budget_exhausted"


leaky = Arm("leaky", description="Gives its key away", calls=["models:chat", "files:write"])


@leaky.operation("execute")
async def leak(task: Task, ctx: Context) -> str:
    """Answer with the key of the models."""
    return (await ctx.model.endpoint()).api_key


async def test_a_key_that_got_out_is_worth_little(tmp_path):
    async with served(leaky, lambda _: "Hello", tmp_path) as (harness, _provider):
        headers = {"X-Timeout-Ms": "20000"}
        token = harness.token("leaky:execute")
        answer = await harness.send("leaky", "POST", "/execute", token=token, body={"goal": "x"}, headers=headers)
        key = msgspec.json.decode(answer.body)["output"]
        claims = msgspec.json.decode(urlsafe_b64decode(key.split("~")[0].split(".")[1] + "=="))
        # It ends with the call that it was made for, opens one operation of one service, and cannot be passed on.
        assert 0 < claims["exp"] - harness.clock.now() <= 20
        assert (claims["aud"], claims["scope"]) == ("models", "models:chat")
        assert "gnt" not in claims
        stored = await harness.send("orchestrator", "POST", "/files", token=key, body=b"x")
        assert stored.status == 401
        again = await harness.send("leaky", "POST", "/execute", token=key, body={"goal": "x"})
        assert again.status == 401
        chat = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
        said = await harness.send("models", "POST", "/v1/chat/completions", token=key, body=chat)
        assert said.status == 200


@contextlib.asynccontextmanager
async def served(arm: Arm, script, tmp_path):
    """Serve an arm and the models service on sockets, before a scripted provider."""
    async with scripted_model(script) as provider, start_harness(arm.name) as harness:
        environment = {
            "OCTOLLM_HOME": str(tmp_path),
            "OCTOLLM_MODEL": "openai:scripted",
            "OCTOLLM_MODEL_URL": provider.url,
        }
        harness.declarations = {**harness.declarations, **arm.declarations()}

        @contextlib.asynccontextmanager
        async def opening():
            yield build_arm(arm, harness.base(arm.name))

        settings = read_settings(environment, ())
        async with harness.serve(models_service(harness.base("models"), settings)), harness.serve(opening()):
            yield harness, provider


async def test_the_sdks_calls_are_budgeted_and_journaled(tmp_path):
    async with served(plain, lambda _: "Hello there", tmp_path) as (harness, provider):
        token, body = harness.token("plain:execute"), {"goal": "Say hello"}
        key = {"Idempotency-Key": "task-1:s1:1"}
        answer = await harness.send("plain", "POST", "/execute", token=token, body=body, headers=key)
        assert answer.status == 200, answer.body
        assert len(harness.records.reserved) == len(harness.records.settled) == 1
        assert harness.records.used.total_tokens > 0
        # The arm is lost with its answer, and the step is done again: what the model said is not paid twice.
        harness.records.claims.clear()
        again = await harness.send("plain", "POST", "/execute", token=token, body=body, headers=key)
        assert again.body == answer.body
        assert len(provider.requests) == 1


async def test_leaving_stops_the_model_behind_the_sdk(tmp_path):
    async with served(plain, lambda _: ScriptedReply("Once upon", hangs=True), tmp_path) as (harness, provider):
        token = harness.token("plain:execute")
        asking = asyncio.create_task(harness.send("plain", "POST", "/execute", token=token, body={"goal": "Go on"}))
        await wait_until(lambda: provider.active, description="the provider writes")
        asking.cancel()
        await wait_until(lambda: provider.disconnects == 1, description="the provider sees its client leave")


# Pydantic AI


class Weather(BaseModel):
    city: str
    rain: bool


def weather_agent() -> Agent[Context, str]:
    agent = Agent(instructions="You tell the weather.", deps_type=Context)

    @agent.tool
    async def weather(run: RunContext[Context], city: str) -> str:
        """Tell the weather of a city."""
        await run.deps.progress(50, city)
        found = await run.deps.call("retriever", "search", {"query": city})
        return f"{city}: {found['passages'][0]['text']}"

    return agent


RAIN = {
    "passages": [{"source": "w", "digest": "0", "line_start": 1, "line_end": 1, "text": "rain", "score": 1.0}],
}


async def test_an_agent_is_an_arm_with_its_tools():
    arm = Arm.from_agent(
        weather_agent(), name="weather", description="Tells the weather", calls=["models:chat", "retriever:search"]
    )
    answers = [ToolUse("weather", {"city": "Bonn"}), "It rains in Bonn."]
    async with ArmTestClient(arm, model=answers, answers={"retriever:search": RAIN}) as client:
        task = {"goal": "Rain?", "constraints": ["Be short."], "context": {"text": "Bonn", "reasons": ["too long"]}}
        result = await client.call("execute", task)
        assert result.output == client.text == "It rains in Bonn."
        assert len(client.emitted) > 1
        assert result.usage.completion_tokens == 5
        assert client.progress == [(50.0, "Bonn")]
        first, second = client.model.requests
        assert first.tools[0].function.name == "weather"
        assert second.messages[-1].text == "Bonn: rain"
        prompt = first.messages[-1].text
        assert [part in prompt for part in ("Rain?", "- Be short.", "Bonn", "- too long")] == [True] * 4


async def test_an_agents_structured_output_is_json():
    arm = Arm.from_agent(Agent(output_type=Weather), name="weather", description="Tells the weather")
    async with ArmTestClient(arm, model=[ToolUse("final_result", {"city": "Bonn", "rain": True})]) as client:
        result = await client.call("execute", {"goal": "Rain?"})
        assert result.output == '{"city":"Bonn","rain":true}'


@pytest.mark.parametrize("code", ["context_too_long", "no_model"])
async def test_an_agents_failure_keeps_the_models_code(code):
    arm = Arm.from_agent(Agent(), name="weather", description="Tells the weather")
    async with ArmTestClient(arm, model=lambda _: OctoError("Told by the test.", code=code)) as client:
        with pytest.raises(OctoError) as caught:
            await client.call("execute", {"goal": "Rain?"})
        assert caught.value.code == code


async def test_an_agents_budget_is_the_tasks():
    arm = Arm.from_agent(Agent(), name="weather", description="Tells the weather")
    async with ArmTestClient(arm, model=["never"], max_tokens=1) as client:
        with pytest.raises(OctoError) as caught:
            await client.call("execute", {"goal": "Rain in Bonn?"})
        assert caught.value.code == "budget_exhausted"
        assert client.model.requests == []


async def test_an_agent_without_the_models_says_what_to_declare():
    arm = Arm.from_agent(Agent(), name="weather", description="Tells the weather", calls=[])
    async with ArmTestClient(arm) as client:
        with pytest.raises(OctoError, match=r'calls=\["models:chat"\]'):
            await client.call("execute", {"goal": "Rain?"})


def test_an_agent_with_other_dependencies_is_refused():
    with pytest.raises(OctoError, match="deps_type=Context"):
        Arm.from_agent(Agent(deps_type=int), name="weather", description="Tells the weather")


def test_an_agent_without_its_framework_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic_ai", None)
    monkeypatch.delitem(sys.modules, "octollm.arm.agents")
    with pytest.raises(OctoError, match=r"pip install 'octollm\[agents\]'"):
        Arm.from_agent(None, name="weather", description="Tells the weather")


async def test_what_an_agents_tool_may_not_call_ends_the_step():
    arm = Arm.from_agent(weather_agent(), name="weather", description="Tells the weather", calls=["models:chat"])
    async with ArmTestClient(arm, model=[ToolUse("weather", {"city": "Bonn"})]) as client:
        with pytest.raises(OctoError, match=r'calls=\["retriever:search"\]') as caught:
            await client.call("execute", {"goal": "Rain?"})
        assert caught.value.code == "authority_missing"


async def test_an_agent_that_comes_to_nothing_is_told_as_such():
    arm = Arm.from_agent(Agent(output_type=Weather), name="weather", description="Tells the weather")
    async with ArmTestClient(arm, model=lambda _: ToolUse("final_result", {"city": "Bonn"})) as client:
        with pytest.raises(OctoError) as caught:
            await client.call("execute", {"goal": "Rain?"})
        assert caught.value.code == "model_output_invalid"


async def test_an_agents_end_is_its_callers(tmp_path):
    arm = Arm.from_agent(Agent(), name="weather", description="Tells the weather")
    async with served(arm, lambda _: ScriptedReply("Once upon", hangs=True), tmp_path) as (harness, provider):
        token = harness.token("weather:execute")
        asking = asyncio.create_task(harness.send("weather", "POST", "/execute", token=token, body={"goal": "Go on"}))
        await wait_until(lambda: provider.active, description="the provider writes")
        asking.cancel()
        await wait_until(lambda: provider.disconnects == 1, description="the provider sees its client leave")
