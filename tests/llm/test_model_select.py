import pytest
from llm_support import CONTENT, small_entry

from octollm.errors import OctoError
from octollm.llm.catalogue import cost_usd
from octollm.llm.openai_compatible import OpenAICompatibleModel
from octollm.llm.selection import resolve_model
from octollm.llm.types import ChatUsage

SMALL, LARGE = small_entry("small"), small_entry("large", CONTENT * 2)


def put(cache, entry, content):
    cache.root.mkdir(parents=True, exist_ok=True)
    cache.path_of(entry).write_bytes(content)


def resolve(setting, cache, **options):
    return resolve_model(setting, None, None, cache, catalogue=(SMALL, LARGE), **options)


def test_embedded_is_the_largest_in_the_cache(cache):
    put(cache, SMALL, CONTENT)
    assert resolve("embedded", cache).entry is SMALL
    put(cache, LARGE, CONTENT * 2)
    assert resolve("embedded", cache).name == "large"
    assert resolve("embedded:small", cache).entry is SMALL


@pytest.mark.parametrize("setting", ["embedded", "embedded:small"])
def test_without_a_model_both_ways_to_one_are_said(cache, setting):
    with pytest.raises(OctoError) as failed:
        resolve(setting, cache)
    assert failed.value.code == "no_model"
    assert "octollm models pull small" in failed.value.detail
    assert "OCTOLLM_MODEL=openai:NAME with OCTOLLM_MODEL_URL" in failed.value.detail


def test_a_named_model_that_is_not_there_is_the_one_to_pull(cache):
    put(cache, SMALL, CONTENT)
    with pytest.raises(OctoError, match="octollm models pull large"):
        resolve("embedded:large", cache)


@pytest.mark.parametrize("setting", ["", "embedded:", "openai", "openai:", "other:x", "embedded:unknown"])
def test_anything_else_is_refused(cache, setting):
    put(cache, SMALL, CONTENT)
    with pytest.raises(OctoError) as failed:
        resolve(setting, cache)
    assert failed.value.code == "setting_invalid"


async def test_a_damaged_file_is_found_at_opening(cache):
    put(cache, SMALL, CONTENT[:-1] + b"X")
    with pytest.raises(OctoError) as failed:
        await resolve("embedded", cache).open()
    assert failed.value.code == "model_damaged"


async def test_a_file_that_llama_cannot_load_says_why(cache):
    put(cache, SMALL, CONTENT)
    with pytest.raises(OctoError, match="embedded model failed") as failed:
        await resolve("embedded", cache).open()
    assert failed.value.code == "model_failed"


async def test_a_provider(cache):
    choice = resolve_model("openai:gpt-x:latest", "http://localhost:9/v1/", "sk-1", cache)
    assert choice.name == "openai:gpt-x:latest"
    assert choice.entry is None
    model = await choice.open()
    assert isinstance(model, OpenAICompatibleModel)
    await model.aclose()


def test_prices():
    usage = ChatUsage.of(1_000_000, 1_000_000)
    assert cost_usd("qwen2.5-coder-0.5b", usage) == 0.0
    assert cost_usd("openai:gpt-x", usage) is None
