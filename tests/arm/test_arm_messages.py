"""Messages, images and tools for the model of an arm."""

from base64 import b64encode
from dataclasses import dataclass

import pytest

from octollm import Arm, Context, Image, Message, OctoError, Task, Tool, ToolCall
from octollm.llm.catalogue import SMALLEST_MODEL
from octollm.llm.embedded import EmbeddedModel
from octollm.llm.openai_protocol import build_request
from octollm.llm.types import (
    MAX_IMAGE_TOKENS,
    ChatMessage,
    ChatRequest,
    ImagePart,
    ImageUrl,
    TextPart,
    bound_prompt_tokens,
)
from octollm.testing import ArmTestClient, ToolUse


@dataclass
class City:
    name: str
    days: int = 1


FORECAST = Tool("forecast", City, "Tells the weather of a city.")

weather = Arm("weather", description="Tells the weather", calls=["models:chat"])


@weather.operation
async def execute(task: Task, ctx: Context) -> str:
    """Let the model call a tool until it answers."""
    messages = [Message.system("You tell the weather."), Message.user(task.goal)]
    while True:
        completion = await ctx.model.chat(messages, tools=[FORECAST])
        if not completion.tool_calls:
            return completion.text
        messages.append(Message.assistant(completion.text, tool_calls=completion.tool_calls))
        for call in completion.tool_calls:
            city = FORECAST.arguments_of(call)
            messages.append(Message.tool(call, f"rain in {city.name} for {city.days} days"))


@weather.operation
async def look(body: str, ctx: Context) -> str:
    """Ask about an image."""
    picture = Image(b"\x89PNG", "image/png")
    return (await ctx.model.chat([Message.user(body, images=[picture]), ("user", "Be short.")])).text


@weather.operation
async def call_required(body: str, ctx: Context) -> str:
    """Have the model call one tool."""
    completion = await ctx.model.chat([Message.user(body)], tools=[FORECAST], tool_choice=FORECAST)
    return f"{completion.finish_reason}: {completion.tool_calls[0].name}"


async def test_a_model_calls_tools_with_typed_arguments():
    answers = [ToolUse("forecast", {"name": "Bonn", "days": 2}), "Take an umbrella."]
    async with ArmTestClient(weather, model=answers) as client:
        result = await client.call("execute", {"goal": "Rain?"})
        assert result.output == "Take an umbrella."
        first, second = client.model.requests
        function = first.tools[0].function
        assert (function.name, function.description) == ("forecast", "Tells the weather of a city.")
        assert function.parameters["required"] == ["name", "days"]
        assert [message.role for message in second.messages] == ["system", "user", "assistant", "tool"]
        assert second.messages[-1].text == "rain in Bonn for 2 days"
        assert second.messages[2].tool_calls[0].id == second.messages[3].tool_call_id


async def test_arguments_that_do_not_fit_are_the_models_fault():
    async with ArmTestClient(weather, model=[ToolUse("forecast", {"days": "many"})]) as client:
        with pytest.raises(OctoError, match="do not fit City") as caught:
            await client.call("execute", {"goal": "Rain?"})
        assert caught.value.code == "model_output_invalid"
    with pytest.raises(OctoError) as caught:
        FORECAST.arguments_of(ToolCall("1", "forecast", '{"name": 3}'))
    assert [fault.pointer for fault in caught.value.field_errors] == ["/name"]


async def test_a_tool_can_be_required():
    async with ArmTestClient(weather, model=[ToolUse("forecast", {"name": "Bonn"})]) as client:
        assert await client.call("call_required", "Bonn") == "tool_calls: forecast"
        assert client.model.requests[0].tool_choice.function.name == "forecast"


async def test_an_image_goes_with_the_message():
    async with ArmTestClient(weather, model=["a cat"]) as client:
        assert await client.call("look", "What is it?") == "a cat"
        message, plain = client.model.requests[0].messages
        url = "data:image/png;base64," + b64encode(b"\x89PNG").decode()
        assert message.content == (TextPart("What is it?"), ImagePart(ImageUrl(url, "low")))
        assert (plain.role, plain.content) == ("user", "Be short.")


def test_a_provider_is_sent_the_image_and_others_plain_text():
    image = ImagePart(ImageUrl("data:image/png;base64,AA==", "high"))
    seen = ChatMessage("user", (TextPart("Look"), image))
    request = build_request("gpt", ChatRequest("default", (seen, ChatMessage("user", (TextPart("a"), TextPart("b"))))))
    assert [message.content for message in request.messages] == [(TextPart("Look"), image), "ab"]
    without = bound_prompt_tokens([ChatMessage("user", "Look")])
    assert bound_prompt_tokens([seen]) == without + MAX_IMAGE_TOKENS["high"]


async def test_the_embedded_model_refuses_images(tmp_path):
    seen = ChatMessage("user", (ImagePart(ImageUrl("data:image/png;base64,AA==")),))
    model = EmbeddedModel(SMALLEST_MODEL, tmp_path / "never.gguf")
    with pytest.raises(OctoError, match="cannot read images") as caught:
        await model.count_tokens([seen])
    assert caught.value.code == "no_model"
    with pytest.raises(OctoError, match="cannot read images"):
        await anext(model.stream(ChatRequest("default", (seen,))))
