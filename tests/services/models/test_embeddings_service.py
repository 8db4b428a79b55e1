import base64
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from openai import AsyncOpenAI

from octollm.config import read_settings
from octollm.contracts.problems import Problem
from octollm.llm.embeddings import MAX_INPUT_TOKENS
from octollm.rpc.http_client import HttpResponse
from octollm.services.models.embeddings import MAX_INPUTS
from octollm.services.models.service import models_service
from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedModel, scripted_model
from octollm.testing.harness import Harness, start_harness

QUESTION = "Wie lange ist die Kündigungsfrist?"
PASSAGES = ("Der Vertrag kann mit drei Monaten Frist gekündigt werden.", "The cat sleeps on the warm roof.")


@contextlib.asynccontextmanager
async def models(tmp_path, **settings: str) -> AsyncIterator[Harness]:
    environment = {"OCTOLLM_HOME": str(tmp_path), "OCTOLLM_MODEL_CACHE": str(tmp_path / "none"), **settings}
    settings_read = read_settings(environment, ())
    async with start_harness() as harness, harness.serve(models_service(harness.base("models"), settings_read)):
        yield harness


@contextlib.asynccontextmanager
async def models_over_provider(tmp_path) -> AsyncIterator[tuple[Harness, ScriptedModel]]:
    async with scripted_model([]) as provider:
        settings = {"OCTOLLM_EMBEDDING_MODEL": "openai:small", "OCTOLLM_EMBEDDING_URL": provider.url}
        async with models(tmp_path, **settings) as harness:
            yield harness, provider


async def post(harness: Harness, body: object, *, token: str | None = None, **headers: str) -> HttpResponse:
    token = harness.token("models:embeddings") if token is None else token
    return await harness.send("models", "POST", "/v1/embeddings", token=token, body=body, headers=headers)


def problem(answer: HttpResponse) -> Problem:
    return msgspec.json.decode(answer.body, type=Problem)


def vectors(answer: HttpResponse) -> list[list[float]]:
    assert answer.status == 200, answer.body
    return [each["embedding"] for each in msgspec.json.decode(answer.body)["data"]]


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


async def test_the_stock_openai_client_gets_vectors(tmp_path) -> None:
    async with models(tmp_path) as harness:
        token = harness.token("models:embeddings", lifetime=600)
        async with AsyncOpenAI(base_url=harness.urls["models"] + "/v1", api_key=token, max_retries=0) as client:
            # The client asks for base64 and decodes it.
            asked = await client.embeddings.create(model="default", input=QUESTION)
            found = await client.embeddings.create(
                model="multilingual-e5-small", input=list(PASSAGES), extra_body={"input_type": "passage"}
            )
            numbers = await client.embeddings.create(model="default", input=QUESTION, encoding_format="float")
    assert asked.model == "multilingual-e5-small"
    assert (asked.object, [each.index for each in found.data]) == ("list", [0, 1])
    assert asked.usage.prompt_tokens == asked.usage.total_tokens > 5
    query = asked.data[0].embedding
    assert len(query) == 384
    assert dot(query, query) == pytest.approx(1, abs=1e-4)
    assert numbers.data[0].embedding == pytest.approx(query)
    # In German, the passage that answers is nearer than one about a cat.
    assert dot(query, found.data[0].embedding) > dot(query, found.data[1].embedding) + 0.05


async def test_a_query_and_a_passage_have_different_vectors(tmp_path) -> None:
    async with models(tmp_path) as harness:
        query, passage = [
            vectors(await post(harness, {"model": "default", "input": PASSAGES[1], "input_type": kind}))[0]
            for kind in ("query", "passage")
        ]
    assert 0.5 < dot(query, passage) < 0.9999


async def test_base64_is_little_endian_float32(tmp_path) -> None:
    async with models(tmp_path) as harness:
        body = {"model": "default", "input": "x"}
        (packed,) = vectors(await post(harness, {**body, "encoding_format": "base64"}))
        (numbers,) = vectors(await post(harness, body))
    assert struct.unpack("<384f", base64.b64decode(str(packed))) == pytest.approx(numbers)


async def test_tokens_are_reserved_settled_and_a_repeat_is_free(tmp_path) -> None:
    async with models(tmp_path) as harness:
        token = harness.token("models:embeddings")
        body = {"model": "default", "input": ["hello there", "world"]}
        first = await post(harness, body, token=token, **{"Idempotency-Key": "k-1"})
        again = await post(harness, body, token=token, **{"Idempotency-Key": "k-1"})
        assert msgspec.json.decode(first.body) == msgspec.json.decode(again.body)
        (settled,) = harness.records.settled
        used = msgspec.json.decode(first.body)["usage"]["prompt_tokens"]
        assert (settled.usage.prompt_tokens, settled.usage.completion_tokens) == (used, 0)
        assert harness.records.reserved[0].prompt_tokens == used
        assert harness.records.reserved[0].model == "multilingual-e5-small"
        metrics = await harness.send("models", "GET", "/metrics")
        line = f'octollm_model_tokens_total{{kind="prompt",model="multilingual-e5-small"}} {float(used)}'
        assert line in metrics.body.decode()


async def test_a_task_without_budget_gets_none(tmp_path) -> None:
    async with models(tmp_path) as harness:
        harness.records.tokens = 3
        answer = await post(harness, {"model": "default", "input": "a text of more than three tokens"})
        assert problem(answer).code == "budget_exhausted"
        assert harness.records.settled == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"input": "x"}, "invalid_body"),
        ({"input": ""}, "invalid_body"),
        ({"input": ["x", " \n"]}, "invalid_body"),
        ({"input": []}, "invalid_body"),
        ({"input": ["x"] * (MAX_INPUTS + 1)}, "invalid_body"),
        ({"input": [1, 2, 3]}, "invalid_body"),
        ({"input": None}, "invalid_body"),
        ({"input": "x", "dimensions": 100}, "invalid_body"),
        ({"input": "x", "dimensions": 0}, "invalid_body"),
        ({"input": "x", "encoding_format": "hex"}, "invalid_body"),
        ({"input": "x", "input_type": "document"}, "invalid_body"),
        ({"input": "x", "model": "gpt-9"}, "not_found"),
        ({"input": "word " * (MAX_INPUT_TOKENS + 1)}, "context_too_long"),
    ],
)
async def test_a_wrong_body_is_refused(tmp_path, body: dict[str, Any], code: str) -> None:
    async with models(tmp_path) as harness:
        harness.records.tokens = 1_000_000
        answer = await post(harness, body if body == {"input": "x"} else {"model": "default", **body})
        assert problem(answer).code == code
        assert all(settled.usage.total_tokens == 0 for settled in harness.records.settled)


async def test_the_place_of_a_blank_text_is_named(tmp_path) -> None:
    async with models(tmp_path) as harness:
        errors = problem(await post(harness, {"model": "default", "input": ["x", ""]})).errors
        assert errors is not None
        assert [each.pointer for each in errors] == ["/input/1"]


@pytest.mark.parametrize(
    "text", ["a\x00b", "🙂" * 50, "\u202eabc\u202c مرحبا", "\ufeff\u200b", "." * 500, "\U000e0041"]
)
async def test_odd_texts_have_vectors(tmp_path, text: str) -> None:
    async with models(tmp_path) as harness:
        (vector,) = vectors(await post(harness, {"model": "default", "input": text}))
        assert dot(vector, vector) == pytest.approx(1, abs=1e-3)


async def test_a_nul_does_not_end_a_text(tmp_path) -> None:
    async with models(tmp_path) as harness:
        whole, cut = vectors(await post(harness, {"model": "default", "input": ["cat\x00contract", "cat"]}))
        assert dot(whole, cut) < 0.99


async def test_the_wrong_token_is_refused(tmp_path) -> None:
    async with models(tmp_path) as harness:
        body = {"model": "default", "input": "x"}
        for token, status, code in (
            (harness.token("models:chat"), 403, "scope_missing"),
            (harness.token("memory:read"), 401, "token_invalid"),
            ("", 401, "token_malformed"),
        ):
            answer = await post(harness, body, token=token)
            assert (answer.status, problem(answer).code) == (status, code)


async def test_only_the_memory_embeds_for_its_index(tmp_path) -> None:
    async with models(tmp_path) as harness:
        body = {"model": "default", "input": list(PASSAGES), "input_type": "passage"}
        for name, status in (("memory", 200), ("retriever", 403), ("coder", 403)):
            token = harness.base(name).identity.signer().sign_token("models")
            answer = await harness.send("models", "POST", "/index/embeddings", token=token, body=body)
            assert answer.status == status
        answer = await harness.send(
            "models", "POST", "/index/embeddings", token=harness.token("models:embeddings"), body=body
        )
        assert answer.status == 401
        assert harness.records.reserved == []


async def test_a_provider_computes_them(tmp_path) -> None:
    async with models_over_provider(tmp_path) as (harness, provider):
        answer = await post(harness, {"model": "default", "input": ["red green", "blue"], "dimensions": 32})
        assert [len(vector) for vector in vectors(answer)] == [32, 32]
        document = msgspec.json.decode(answer.body)
        assert (document["model"], document["usage"]["prompt_tokens"]) == ("openai:small", 3)
        # The provider's tokenizer is unknown: bytes are the bound that is reserved, its count is what is paid.
        assert harness.records.reserved[0].prompt_tokens == len("red green") + len("blue") + 4
        assert harness.records.settled[0].usage.prompt_tokens == 3
        assert provider.embedded == [("red green", "blue")]


async def test_a_failing_provider_is_an_error_that_costs_nothing(tmp_path) -> None:
    async with models_over_provider(tmp_path) as (harness, provider):
        provider.embedding_error = 400
        answer = await post(harness, {"model": "default", "input": "x"})
        assert problem(answer).code == "model_failed"
        await wait_until(lambda: harness.records.settled, description="the call is settled")
        assert harness.records.settled[0].usage.total_tokens == 0


async def test_they_can_be_turned_off(tmp_path) -> None:
    async with models(tmp_path, OCTOLLM_EMBEDDING_MODEL="off") as harness:
        answer = await post(harness, {"model": "default", "input": "x"})
        assert (answer.status, problem(answer).code) == (404, "not_configured")


@pytest.mark.parametrize(("setting", "detail"), [("embedded", "multilingual-e5-small"), ("off", "off")])
async def test_ready_names_the_model(tmp_path, setting: str, detail: str) -> None:
    async with models(tmp_path, OCTOLLM_EMBEDDING_MODEL=setting) as harness:
        ready = msgspec.json.decode((await harness.send("models", "GET", "/ready")).body)
        state = ready["dependencies"]["embeddings"]
        assert (state["ok"], state["detail"], state["required"]) == (True, detail, False)
