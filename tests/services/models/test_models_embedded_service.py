"""The models service over the embedded model itself."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from octollm.config import read_settings
from octollm.llm.cache import ModelCache
from octollm.llm.catalogue import SMALLEST_MODEL
from octollm.services.models.service import models_service
from octollm.testing import wait_until
from octollm.testing.harness import start_harness

CACHE = Path(os.environ.get("OCTOLLM_MODEL_CACHE") or Path.home() / ".cache" / "octollm" / "models")
pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


@pytest.fixture
def settings(tmp_path):
    if not ModelCache(CACHE).has(SMALLEST_MODEL):
        if os.environ.get("CI"):
            pytest.fail(f"the embedded model is needed in CI: {CACHE}")
        pytest.skip(f"no embedded model in {CACHE}")
    environment = {
        "OCTOLLM_HOME": str(tmp_path),
        "OCTOLLM_MODEL_CACHE": str(CACHE),
        "OCTOLLM_MODEL": f"embedded:{SMALLEST_MODEL.name}",
        "OCTOLLM_MODEL_CONTEXT": "2048",
    }
    return read_settings(environment, ())


async def test_it_answers_is_cancelled_and_answers_again(settings) -> None:
    async with start_harness() as harness, harness.serve(models_service(harness.base("models"), settings)):
        ask = {"model": "default", "messages": [{"role": "user", "content": "Say the word: octopus"}]}
        token = harness.token("models:chat")
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        url = harness.urls["models"] + "/v1/chat/completions"

        async def whole(limit: int) -> dict[str, object]:
            answer = await harness.send(
                "models", "POST", "/v1/chat/completions", token=token, body={**ask, "max_tokens": limit}, seconds=200
            )
            assert answer.status == 200, answer.body
            return msgspec.json.decode(answer.body)

        first = await whole(8)
        usage = first["usage"]
        assert isinstance(usage, dict)
        assert 0 < usage["completion_tokens"] <= 8
        assert usage["prompt_tokens"] == harness.records.reserved[0].prompt_tokens  # counted exactly
        assert usage["cost_usd"] == 0.0

        long = {**ask, "stream": True, "max_tokens": 1500}
        long["messages"] = [{"role": "user", "content": "Count from one to a thousand in words."}]
        seen = b""
        async with harness.http.stream("POST", url, headers, msgspec.json.encode(long), seconds=200) as answer:
            async for chunk in answer.chunks:
                seen += chunk
                if seen.count(b"data:") > 5:
                    break
        await wait_until(lambda: len(harness.records.settled) == 2, description="the cut call is settled", timeout=20)
        cut = harness.records.settled[1].usage
        assert 0 < cut.completion_tokens < 500  # stopped at once: nowhere near the limit
        # The one place is free again.
        async with asyncio.timeout(60):
            await whole(4)
        ready = msgspec.json.decode((await harness.send("models", "GET", "/ready")).body)
        assert ready["dependencies"]["model"].pop("latency_ms") >= 0
        assert ready["dependencies"]["model"] == {"ok": True, "detail": SMALLEST_MODEL.name, "required": False}


async def test_a_prompt_that_does_not_fit_is_refused_and_costs_nothing(settings) -> None:
    async with start_harness() as harness, harness.serve(models_service(harness.base("models"), settings)):
        body = {"model": "default", "messages": [{"role": "user", "content": "octopus " * 4000}]}
        for stream in (False, True):
            answer = await harness.send(
                "models",
                "POST",
                "/v1/chat/completions",
                token=harness.token("models:chat"),
                body={**body, "stream": stream},
                seconds=200,
            )
            assert answer.status == 400
            assert msgspec.json.decode(answer.body)["code"] == "context_too_long"
        await wait_until(lambda: len(harness.records.settled) == 2, description="both are settled")
        assert harness.records.used.total_tokens == 0
