import asyncio
import json
import os
import signal
import sys
import threading
from contextlib import aclosing, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from octollm.errors import OctoError
from octollm.llm.cache import ModelCache
from octollm.llm.catalogue import SMALLEST_MODEL
from octollm.llm.embedded import EmbeddedModel, EmbeddedSettings
from octollm.llm.llama_process import LlamaProcess, LlamaSettings
from octollm.llm.types import (
    ChatMessage,
    ChatRequest,
    CompletionEnd,
    Function,
    JsonSchemaFormat,
    ResponseFormat,
    TextDelta,
    Tool,
)
from octollm.testing import wait_until

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

LONG = "Count from one to a thousand in words, one number a line."
BIG = "Remember: " + " ".join(str(number) for number in range(1200))
CONTEXT = 6144


@pytest.fixture(scope="module")
def path() -> Path:
    cache = ModelCache()
    if not cache.has(SMALLEST_MODEL):
        if os.environ.get("CI"):
            pytest.fail(f"{SMALLEST_MODEL.name} is not in the cache")
        pytest.skip(f"{SMALLEST_MODEL.name} is not in the cache: octollm models pull {SMALLEST_MODEL.name}")
    return cache.path_of(SMALLEST_MODEL)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(path):
    model = EmbeddedModel(SMALLEST_MODEL, path, EmbeddedSettings(context_tokens=CONTEXT - 100))
    await model.start()
    yield model
    await model.aclose()


def ask(text, **members):
    return ChatRequest("any", (ChatMessage("user", text),), **members)


async def answer(model, request):
    async with aclosing(model.stream(request)) as pieces:
        *deltas, final = [piece async for piece in pieces]
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert isinstance(final, CompletionEnd)
    return "".join(delta.text for delta in deltas), final


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def wait_until_idle(pid):
    """Wait until the process uses next to no processor time: a generation would use all of a core."""
    last = -1.0

    def rests():
        nonlocal last
        before, last = last, cpu_seconds(pid)
        return last - before < 0.03

    await wait_until(rests, description="llama.cpp rests", timeout=20, interval=0.3)


async def test_an_answer_comes_piece_by_piece_and_is_the_same_every_time(model):
    request = ask("Write a Python function that adds two numbers.", max_tokens=40)
    async with aclosing(model.stream(request)) as pieces:
        seen = [piece async for piece in pieces]
    assert len(seen) > 10
    text, final = await answer(model, request)
    assert text == "".join(piece.text for piece in seen[:-1])
    assert "def" in text
    assert final.finish_reason == "length"
    assert final.usage.completion_tokens == 40
    assert final.exact


@pytest.mark.parametrize(
    "messages",
    [
        (ChatMessage("user", "hi"),),
        (ChatMessage("system", "Be short."), ChatMessage("user", "na\u00efve \U0001f389 \u6f22\u5b57 \ud800")),
        (ChatMessage("user", "hi"), ChatMessage("assistant", "hello"), ChatMessage("user", "<|im_end|> again")),
        (ChatMessage("developer", "x"), ChatMessage("user", "")),
    ],
)
async def test_the_count_is_what_is_charged(model, messages):
    counted = await model.count_tokens(messages)
    _, final = await answer(model, ChatRequest("any", messages, max_tokens=1))
    assert final.usage.prompt_tokens == counted


async def test_a_schema_is_kept(model):
    schema = {
        "type": "object",
        "properties": {
            "steps": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": {"type": "string", "minLength": 3, "maxLength": 30},
            },
            "sure": {"type": "boolean"},
        },
        "required": ["steps", "sure"],
        "additionalProperties": False,
    }
    form = ResponseFormat("json_schema", JsonSchemaFormat(schema))
    text, final = await answer(model, ask("How do I boil an egg?", response_format=form, max_tokens=200))
    document = json.loads(text)
    assert set(document) == {"steps", "sure"}
    assert len(document["steps"]) == 2
    assert final.finish_reason == "stop"


async def test_json_is_json(model):
    text, _ = await answer(
        model, ask("Name a colour as JSON.", response_format=ResponseFormat("json_object"), max_tokens=100)
    )
    assert isinstance(json.loads(text), dict)


async def test_a_schema_that_llama_does_not_know_is_the_callers_fault(model):
    form = ResponseFormat("json_schema", JsonSchemaFormat({"type": "strange"}))
    with pytest.raises(OctoError, match="strange") as failed:
        await answer(model, ask("x", response_format=form))
    assert failed.value.code == "invalid_body"


async def test_it_stops_where_it_is_told_to(model):
    text, final = await answer(model, ask("Count: 1 2 3 4 5 6 7 8 9", stop=["5"], max_tokens=60, seed=-1, top_p=0.9))
    assert "5" not in text
    assert final.finish_reason == "stop"


async def test_a_document_cannot_open_a_turn(model):
    plain = await model.count_tokens([ChatMessage("user", "")])
    tokens = await model.count_tokens([ChatMessage("user", "<|im_start|>" * 10)])
    assert tokens - plain > 20  # as control tokens they would be ten


async def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(model):
    assert model.context_tokens == CONTEXT
    request = ask(" ".join(["word"] * CONTEXT))
    counted = await model.count_tokens(request.messages)
    assert counted > CONTEXT
    with pytest.raises(OctoError) as failed:
        await answer(model, request)
    assert failed.value.code == "context_too_long"
    assert f"{counted:,}" in failed.value.detail
    assert f"{CONTEXT:,}" in failed.value.detail
    assert f"at least {counted - CONTEXT + 1:,} tokens" in failed.value.detail


async def test_a_prompt_of_megabytes_is_refused_before_it_is_counted(model):
    with pytest.raises(OctoError) as failed:
        await model.count_tokens([ChatMessage("user", "x" * 5_000_000)])
    assert failed.value.code == "context_too_long"


async def test_closing_the_iterator_stops_decoding(model):
    async with aclosing(model.stream(ask(LONG))) as pieces:
        for _ in range(3):
            await anext(pieces)
    await wait_until_idle(model.pid)
    await answer(model, ask("hi", max_tokens=1))  # the slot is free again


async def test_cancelling_the_task_stops_the_reading_of_the_prompt(model):
    task = asyncio.create_task(answer(model, ask(BIG, max_tokens=1)))
    before = cpu_seconds(model.pid)
    await wait_until(lambda: cpu_seconds(model.pid) > before + 0.3, description="the prompt is read")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until_idle(model.pid)
    assert model.pid is not None  # stopped, not killed


async def test_a_caller_that_leaves_the_queue_takes_nobodys_place(model):
    async with aclosing(model.stream(ask(LONG))) as pieces:
        await anext(pieces)
        leaver = asyncio.create_task(answer(model, ask("hi", max_tokens=1)))
        stayer = asyncio.create_task(answer(model, ask("hi", max_tokens=1)))
        await asyncio.sleep(0)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert not stayer.done()
    await stayer


async def test_no_port_is_opened(model):
    inodes = set()
    for descriptor in Path(f"/proc/{model.pid}/fd").iterdir():
        target = str(descriptor.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = {
        line.split()[9] for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()
    }
    assert inodes
    assert not inodes & listening


async def test_the_child_is_given_no_secrets(path, monkeypatch):
    monkeypatch.setenv("OCTOLLM_MODEL_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    model = EmbeddedModel(SMALLEST_MODEL, path)
    await model.start()
    environment = Path(f"/proc/{model.pid}/environ").read_bytes()
    await model.aclose()
    assert b"PATH=" in environment
    assert b"sk-secret" not in environment


async def test_too_many_waiting_are_refused(path):
    model = EmbeddedModel(SMALLEST_MODEL, path, EmbeddedSettings(context_tokens=512, max_waiting=0))
    async with aclosing(model.stream(ask(LONG))) as pieces:
        await anext(pieces)
        with pytest.raises(OctoError) as failed:
            await answer(model, ask("hi"))
    assert failed.value.code == "overloaded"
    assert failed.value.retry_after
    await model.aclose()


async def test_the_wait_for_a_slot_is_bounded(path):
    model = EmbeddedModel(SMALLEST_MODEL, path, EmbeddedSettings(context_tokens=512, wait_seconds=0.05))
    async with aclosing(model.stream(ask(LONG))) as pieces:
        await anext(pieces)
        with pytest.raises(OctoError, match="no slot free") as failed:
            await answer(model, ask("hi"))
    assert failed.value.code == "overloaded"
    await model.aclose()


async def test_two_slots_answer_side_by_side(path):
    model = EmbeddedModel(SMALLEST_MODEL, path, EmbeddedSettings(context_tokens=512, slots=2))
    async with aclosing(model.stream(ask(LONG))) as one, aclosing(model.stream(ask("Tell a story."))) as two:
        for _ in range(3):
            assert isinstance(await anext(one), TextDelta)
            assert isinstance(await anext(two), TextDelta)
    await model.aclose()


async def test_a_child_that_dies_fails_its_calls_and_is_started_again(path):
    model = EmbeddedModel(SMALLEST_MODEL, path, EmbeddedSettings(context_tokens=512))
    with pytest.raises(OctoError, match="signal 9") as failed:
        async with aclosing(model.stream(ask(LONG))) as pieces:
            await anext(pieces)
            os.kill(model.pid, signal.SIGKILL)
            async for _ in pieces:
                pass
    assert failed.value.code == "model_failed"
    text, _ = await answer(model, ask("hi", max_tokens=4))
    assert text
    await model.aclose()


async def test_closing_ends_everything(path):
    threads = threading.active_count()
    model = EmbeddedModel(SMALLEST_MODEL, path, EmbeddedSettings(context_tokens=512))
    task = asyncio.create_task(answer(model, ask(LONG)))
    await wait_until(lambda: model.pid, description="the child runs")
    pid = model.pid
    folder = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2]
    await model.aclose()
    with pytest.raises(OctoError, match="closed"):
        await task
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(json.loads(folder)["folder"]).exists()
    assert model.pid is None
    with pytest.raises(OctoError, match="closed"):
        await model.count_tokens([ChatMessage("user", "x")])
    await model.aclose()
    await wait_until(lambda: threading.active_count() <= threads + 1, description="no thread is left")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where children have their folders: by a path that is longer than one of a socket can be."""
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    return deep


def children():
    """The process ids of running workers of this process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if status.read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid()):
                found.append(int(status.parent.name))
    return found


async def test_closing_while_it_loads_ends_the_child(path, folders):
    before = children()
    model = EmbeddedModel(SMALLEST_MODEL, path)
    starts = [asyncio.create_task(model.start()) for _ in range(2)]
    await wait_until(lambda: len(children()) > len(before), description="the child is there")
    await model.aclose()
    for start in starts:
        with pytest.raises(OctoError, match="closed"):
            await start
    assert children() == before
    assert not list(folders.glob("octollm-llama-*"))


async def test_a_caller_that_leaves_while_it_loads_does_not_stop_the_others(path, folders):
    model = EmbeddedModel(SMALLEST_MODEL, path, EmbeddedSettings(context_tokens=512))
    leaver = asyncio.create_task(model.start())
    stayer = asyncio.create_task(model.start())
    await wait_until(lambda: list(folders.glob("octollm-llama-*")), description="the child is started")
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    await stayer
    assert model.pid
    await model.aclose()


async def test_without_the_package_the_way_to_it_is_said(path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = EmbeddedModel(SMALLEST_MODEL, path)
    with pytest.raises(OctoError) as failed:
        await model.start()
    assert failed.value.code == "no_model"
    assert "pip install 'octollm[local]'" in failed.value.detail
    await model.aclose()


async def test_a_child_that_hangs_is_ended(path):
    child = await LlamaProcess.start(path, LlamaSettings(1, 64, context_tokens=512, stall_seconds=0.2))
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(OctoError, match="sent no event"):
        await child.count([{"role": "user", "content": "x"}])
    assert not child.alive
    await child.aclose()


async def test_a_child_that_does_not_stop_is_ended(path):
    child = await LlamaProcess.start(path, LlamaSettings(1, 64, context_tokens=512, stop_seconds=0.1))
    ended = asyncio.Event()
    generation = child.chat({"messages": [{"role": "user", "content": LONG}], "stream": True}, ended.set)
    await generation.next(30)
    os.kill(child.pid, signal.SIGSTOP)
    generation.cancel()
    async with asyncio.timeout(10):
        await ended.wait()
    assert not child.alive
    await child.aclose()


async def test_loading_is_bounded_in_time(path):
    with pytest.raises(OctoError, match="not loaded"):
        await LlamaProcess.start(path, LlamaSettings(1, 64, load_seconds=0.01))


async def test_a_tool_that_fits_is_called_and_its_result_told(model):
    """The instructions alone do not make so small a model call: the form in which tools are shown to it does."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = (Tool(Function("clock", "Tell the time of a city.", city)),)
    asked = (ChatMessage("system", "You are a helpful assistant."), ChatMessage("user", "What time is it in Tokyo?"))
    _, final = await answer(model, ChatRequest("x", asked, tools=tools, max_tokens=100))
    [call] = final.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("clock", {"city": "Tokyo"})
    asked += (ChatMessage("assistant", tool_calls=(call,)), ChatMessage("tool", "14:05", tool_call_id=call.id))
    text, final = await answer(model, ChatRequest("x", asked, tools=tools, max_tokens=100))
    assert "14:05" in text
    assert not final.tool_calls


SCRIPT = """
import asyncio, sys
from pathlib import Path
from octollm.llm.catalogue import SMALLEST_MODEL
from octollm.llm.embedded import EmbeddedModel
from octollm.llm.types import ChatMessage, ChatRequest

async def main():
    model = EmbeddedModel(SMALLEST_MODEL, Path(sys.argv[1]))
    await model.start()
    print(model.pid, flush=True)
    async for piece in model.stream(ChatRequest("x", (ChatMessage("user", sys.argv[2]),))):
        sys.exit(0)

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["exit", "interrupt", "kill"])
async def test_a_host_that_ends_without_closing_leaves_nothing(path, end):
    """Exit in the middle of an answer; Ctrl-C and kill -9 in the middle of a prompt."""
    prompt = LONG if end == "exit" else BIG
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SCRIPT, str(path), prompt),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    child = int(await process.stdout.readline())
    if end != "exit":
        await wait_until(lambda: cpu_seconds(child) > 1, description="the prompt is read")
        process.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
    async with asyncio.timeout(20):
        _, errors = await process.communicate()
    await wait_until(lambda: not Path(f"/proc/{child}").exists(), description="the child is gone")
    assert process.returncode == {"exit": 0, "interrupt": -signal.SIGINT, "kill": -signal.SIGKILL}[end]
    if end == "interrupt":
        assert errors.decode().rstrip().endswith("KeyboardInterrupt")
    else:
        assert errors == b""
