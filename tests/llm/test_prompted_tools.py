"""Tools for a model without: what it is asked, and how its answer is read."""

import jsonschema
import msgspec
import pytest

from octollm.errors import OctoError
from octollm.llm.prompted_tools import allows_tools, build_prompted_request, flatten_tool_messages, stream_with_tools
from octollm.llm.types import (
    ChatMessage,
    ChatRequest,
    ChatUsage,
    CompletionEnd,
    Function,
    FunctionCall,
    FunctionName,
    TextDelta,
    Tool,
    ToolCall,
    ToolChoice,
)

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/Name"}}, "required": ["city"]}
WEATHER = Tool(Function("weather", "Tells the weather.", {**CITY, "$defs": {"Name": {"type": "string"}}}))
CLOCK = Tool(Function("clock"))
ASK = ChatRequest("default", (ChatMessage("user", "Rain in Bonn?"),), tools=(WEATHER, CLOCK))
USAGE = ChatUsage.of(10, 5)


async def complete_with(text, request=ASK, finish="stop"):
    async def stream(asked):
        assert not asked.tools
        for piece in (text[:7], text[7:]):
            yield TextDelta(piece)
        yield CompletionEnd(finish, USAGE)

    return [piece async for piece in stream_with_tools(stream, request, "call-1")]


async def test_a_call_is_read_as_a_call():
    [final] = await complete_with('{"tool": "weather", "arguments": {"city": "Bonn"}}')
    assert final == CompletionEnd(
        "tool_calls", USAGE, True, (ToolCall("call-1", FunctionCall("weather", '{"city": "Bonn"}')),)
    )


async def test_an_answer_is_read_as_text():
    assert await complete_with('{"answer": "No rain."}') == [TextDelta("No rain."), CompletionEnd("stop", USAGE)]


async def test_an_answer_that_was_cut_says_so():
    assert await complete_with('{"answer": "No ra', finish="length") == [CompletionEnd("length", USAGE)]


@pytest.mark.parametrize("text", ["No rain.", "{}", "[]", '{"tool": 3}'])
async def test_what_is_neither_fails_as_the_models_fault(text):
    with pytest.raises(OctoError) as failed:
        await complete_with(text)
    assert failed.value.code == "model_failed"


@pytest.mark.parametrize(
    ("choice", "good"),
    [
        ("auto", {"weather", "clock", "answer"}),
        (None, {"weather", "clock", "answer"}),
        ("required", {"weather", "clock"}),
        (ToolChoice(FunctionName("clock")), {"clock"}),
    ],
)
def test_the_schema_allows_what_may_be_chosen(choice, good):
    schema = build_prompted_request(msgspec.structs.replace(ASK, tool_choice=choice)).response_format.json_schema.schema
    jsonschema.Draft202012Validator.check_schema(schema)
    says = {
        "weather": {"tool": "weather", "arguments": {"city": "Bonn"}},
        "clock": {"tool": "clock", "arguments": {}},
        "answer": {"answer": "No."},
    }
    validator = jsonschema.Draft202012Validator(schema)
    assert {name for name, said in says.items() if validator.is_valid(said)} == good
    assert not validator.is_valid({"tool": "weather", "arguments": {"city": 3}})
    assert not validator.is_valid({"tool": "shell", "arguments": {}})


def test_the_calls_stand_behind_the_instructions_and_before_the_answer():
    given = {"city": {"type": "string", "description": "where"}, "unit": {"enum": ["C", "F"]}, "odd": 3}
    tool = Tool(Function("weather", "Tells the weather.", {"type": "object", "properties": given}))
    asked = (ChatMessage("system", "You are brief."), ChatMessage("user", "Rain in Bonn?"))
    [system, user] = build_prompted_request(ChatRequest("default", asked, tools=(tool, CLOCK))).messages
    assert user == asked[1]
    assert system.text.splitlines() == [
        "You are brief.",
        "",
        "Answer with one JSON object, one of these:",
        '- {"tool": "weather", "arguments": {"city": … (where), "unit": "C" | "F", "odd": …}}  Tells the weather.',
        '- {"tool": "clock", "arguments": {}}',
        '- {"answer": "…"}  Only for small talk, and for what none of the above can do.',
    ]
    result = ChatMessage("tool", "dry", tool_call_id="c1")
    complete_with = build_prompted_request(ChatRequest("default", (*asked, result), tools=(CLOCK,))).messages[0].text
    assert complete_with.endswith("Tells what the tool found.")


@pytest.mark.parametrize("parameters", [{}, {"properties": []}, {"properties": {"a": {"enum": 3}}}, {"properties": 1}])
def test_a_schema_that_is_none_breaks_nothing(parameters):
    shown = build_prompted_request(msgspec.structs.replace(ASK, tools=(Tool(Function("odd", None, parameters)),)))
    assert '{"tool": "odd", "arguments": {' in shown.messages[0].text


def test_none_means_no_tools():
    assert allows_tools(ASK)
    assert not allows_tools(msgspec.structs.replace(ASK, tool_choice="none"))


def test_earlier_calls_are_retold():
    call = ToolCall("c1", FunctionCall("weather", '{"city": "Bonn"}'))
    messages = (
        ChatMessage("user", "Rain?"),
        ChatMessage("assistant", tool_calls=(call,)),
        ChatMessage("tool", "dry", tool_call_id="c1"),
    )
    assert flatten_tool_messages(messages) == [
        ChatMessage("user", "Rain?"),
        ChatMessage("assistant", '{"tool": "weather", "arguments": {"city": "Bonn"}}'),
        ChatMessage("user", "Result of weather: dry"),
    ]
