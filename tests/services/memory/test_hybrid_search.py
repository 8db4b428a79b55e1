"""Search by words and vectors, with the models service beside the memory."""

import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from databases import Backend
from multilingual import LANGUAGES, facts

from octollm.capability import ScopeSet
from octollm.config import read_settings
from octollm.contracts.operations import DocumentOut, Passage, SearchResult
from octollm.contracts.problems import Problem
from octollm.services.memory.service import memory_service
from octollm.services.models.service import models_service
from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedModel, scripted_model
from octollm.testing.harness import Harness, start_harness


@dataclass
class SearchKit:
    """Memory and models; ``provider`` computes the embeddings, unless the embedded model does."""

    harness: Harness
    provider: ScriptedModel | None = None

    async def write(self, text: str, name: str = "a.txt", *, tenant: str = "default") -> str:
        digest = hashlib.sha256(f"{name}{text}".encode()).hexdigest()
        token = self.harness.token("memory:write", tenant=tenant)
        body = {"name": name, "text": text, "digest": digest}
        answer = await self.harness.send("memory", "POST", "/documents", token=token, body=body)
        assert answer.status in (200, 201), answer.body
        return digest

    async def read(self, digest: str, *, tenant: str = "default") -> DocumentOut:
        token = self.harness.token("memory:read", tenant=tenant)
        answer = await self.harness.send("memory", "GET", f"/documents/{digest}", token=token)
        return msgspec.json.decode(answer.body, type=DocumentOut)

    async def delete(self, digest: str) -> None:
        token = self.harness.token("memory:write")
        assert (await self.harness.send("memory", "DELETE", f"/documents/{digest}", token=token)).status in (200, 204)

    async def ready(self, *digests: str, tenant: str = "default") -> None:
        for digest in digests:

            async def has_vectors(digest: str = digest) -> bool:
                return (await self.read(digest, tenant=tenant)).vectors == "ready"

            await wait_until(has_vectors, description="the document has its vectors")

    async def find(self, query: str, *, tenant: str = "default", token: str | None = None, **more: Any) -> SearchResult:
        token = token or self.harness.token("memory:read", tenant=tenant)
        answer = await self.harness.send("memory", "POST", "/search", token=token, body={"query": query, **more})
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body, type=SearchResult)


@contextlib.asynccontextmanager
async def serve(tmp_path, backend: Backend, **models: str) -> AsyncIterator[SearchKit]:
    environment = {"OCTOLLM_HOME": str(tmp_path), "OCTOLLM_MODEL_CACHE": str(tmp_path / "none")}
    settings = read_settings({**environment, **backend.environment}, ())
    async with (
        start_harness() as harness,
        harness.serve(models_service(harness.base("models"), read_settings({**environment, **models}, ()))),
        harness.serve(memory_service(harness.base("memory"), settings)),
    ):
        harness.records.tokens = 1_000_000
        yield SearchKit(harness)


@pytest.fixture
async def search_kit(tmp_path, backend: Backend) -> AsyncIterator[SearchKit]:
    async with scripted_model([]) as provider:
        models = {"OCTOLLM_EMBEDDING_MODEL": "openai:words", "OCTOLLM_EMBEDDING_URL": provider.url}
        async with serve(tmp_path, backend, **models) as search_kit:
            search_kit.provider = provider
            yield search_kit


def sources(found: SearchResult) -> list[str]:
    return [passage.source for passage in found.passages]


async def test_nine_languages_are_found_by_questions_in_other_words(tmp_path) -> None:
    everything = [fact for language in LANGUAGES for fact in facts(language, names=1)]
    async with serve(tmp_path, Backend(None)) as search_kit:
        digests = [await search_kit.write(fact.passage, f"{n}.txt") for n, fact in enumerate(everything)]
        await search_kit.ready(*digests)
        missed: dict[str, list[str]] = {language: [] for language in LANGUAGES}
        # Every second topic: a question costs as much as a passage.
        for digest, fact in list(zip(digests, everything, strict=True))[::2]:
            found = await search_kit.find(fact.question)
            assert found.vectors == "used"
            if digest not in [passage.digest for passage in found.passages]:
                missed[fact.language].append(fact.question)
    # recall@5 in each language.
    assert not any(missed.values()), missed


async def test_a_document_gets_vectors_in_the_background(search_kit: SearchKit) -> None:
    digest = await search_kit.write("The pump leaked oil on the floor.")
    await search_kit.ready(digest)
    found = await search_kit.find("leaked floor")
    assert (found.vectors, found.reason, len(found.passages)) == ("used", "", 1)
    # The query was paid by its task, the passage was not.
    assert [each.model for each in search_kit.harness.records.reserved] == ["openai:words"]


async def test_a_search_without_a_common_word_finds_what_is_similar(tmp_path, backend: Backend) -> None:
    async with serve(tmp_path, backend) as search_kit:
        wanted = await search_kit.write("Mitarbeiter haben Anspruch auf dreißig Tage Urlaub.", "urlaub.txt")
        other = await search_kit.write("The server room is cooled by water.", "cooling.txt")
        await search_kit.ready(wanted, other)
        found = await search_kit.find("How many days of vacation do I get?")
        assert [(each.source, each.matched) for each in found.passages] == [("urlaub.txt", ("vectors",))]
        both = await search_kit.find("Urlaub der Mitarbeiter")
        assert both.passages[0].matched == ("words", "vectors")
        # Nothing stored is about it, so nothing is near enough.
        nothing = await search_kit.find("Wer schrieb den Roman Effi Briest?")
        assert (nothing.passages, nothing.vectors, nothing.reason) == ((), "used", "")


async def test_words_answer_while_models_are_away(search_kit: SearchKit) -> None:
    assert search_kit.provider is not None
    search_kit.provider.embedding_error = 500
    digest = await search_kit.write("The pump leaked oil.")
    found = await search_kit.find("pump oil")
    assert (found.vectors, found.reason, sources(found)) == ("unused", "pending", ["a.txt"])
    assert (await search_kit.read(digest)).vectors == "pending"
    search_kit.provider.embedding_error = 0
    await search_kit.write("wakes the loop", "b.txt")
    await search_kit.ready(digest)
    search_kit.provider.embedding_error = 400
    found = await search_kit.find("pump leaked")
    assert (found.vectors, found.reason, sources(found)) == ("unused", "model_failed", ["a.txt"])


async def test_without_the_authority_for_embeddings_words_answer(search_kit: SearchKit) -> None:
    await search_kit.ready(await search_kit.write("The pump leaked oil."))
    token = search_kit.harness.token("memory:read", authority=ScopeSet.parse("memory:read"))
    found = await search_kit.find("pump", token=token)
    assert (found.vectors, found.reason, sources(found)) == ("unused", "authority_missing", ["a.txt"])


async def test_a_spent_budget_leaves_the_words(search_kit: SearchKit) -> None:
    await search_kit.ready(await search_kit.write("The pump leaked oil."))
    search_kit.harness.records.tokens = 1
    found = await search_kit.find("pump")
    assert (found.reason, sources(found)) == ("budget_exhausted", ["a.txt"])


async def test_another_tenants_vectors_are_never_found(search_kit: SearchKit) -> None:
    digest = await search_kit.write("The pump leaked oil.", tenant="acme")
    mine = await search_kit.write("Weather is fine.", "mine.txt")
    await search_kit.ready(digest, tenant="acme")
    await search_kit.ready(mine)
    assert sources(await search_kit.find("The pump leaked oil.")) == ["mine.txt"]
    assert sources(await search_kit.find("The pump leaked oil.", filters={"digests": [digest]})) == []
    assert sources(await search_kit.find("The pump leaked oil.", tenant="acme")) == ["a.txt"]


async def test_a_deleted_document_is_not_found_by_its_vectors(search_kit: SearchKit) -> None:
    first, second = await search_kit.write("red green blue"), await search_kit.write("red green yellow", "b.txt")
    await search_kit.ready(first, second)
    assert sources(await search_kit.find("red green blue")) == ["a.txt", "b.txt"]
    await search_kit.delete(first)
    assert sources(await search_kit.find("red green blue")) == ["b.txt"]
    await search_kit.delete(second)
    assert await search_kit.find("red green blue") == SearchResult(())


async def test_a_replaced_text_has_new_vectors(search_kit: SearchKit) -> None:
    assert search_kit.provider is not None
    digest = await search_kit.write("red green blue")
    await search_kit.ready(digest)
    body = {"name": "a.txt", "text": "circle square", "digest": digest}
    token = search_kit.harness.token("memory:write")
    assert (await search_kit.harness.send("memory", "POST", "/documents", token=token, body=body)).status == 200
    await search_kit.ready(digest)
    (passage,) = (await search_kit.find("circle")).passages
    assert passage.text == "circle square"


async def test_a_search_is_narrowed(search_kit: SearchKit) -> None:
    german = await search_kit.write(
        "Die Pumpe im Keller hat gestern Öl verloren, und niemand hat es bemerkt.", "pumpe.md"
    )
    english = await search_kit.write("The pump in the cellar has lost oil, and nobody noticed it.", "pump.txt")
    await search_kit.ready(german, english)
    assert [(await search_kit.read(each)).language for each in (german, english)] == ["de", "en"]
    for filters, expected in (
        ({"languages": ["de"]}, ["pumpe.md"]),
        ({"languages": ["de", "en"]}, ["pumpe.md", "pump.txt"]),
        ({"media_types": ["text/plain"]}, ["pump.txt"]),
        ({"sources": ["pumpe.md"]}, ["pumpe.md"]),
        ({"digests": [english]}, ["pump.txt"]),
        ({"digests": [english], "languages": ["de"]}, []),
        ({"sources": ["'; DROP TABLE passages; --"]}, []),
    ):
        found = await search_kit.find("pump pumpe oil öl cellar keller", filters=filters)
        assert sorted(sources(found)) == sorted(expected), filters


async def test_a_passage_says_where_it_stands(search_kit: SearchKit) -> None:
    token = search_kit.harness.token("memory:write")
    body = {
        "name": "book.pdf",
        "text": "intro\nred green\n",
        "digest": "0" * 64,
        "locations": [{"line_start": 2, "label": "page 7"}],
    }
    assert (await search_kit.harness.send("memory", "POST", "/documents", token=token, body=body)).status == 201
    await search_kit.ready("0" * 64)
    best: Passage = (await search_kit.find("red green", limit=1)).passages[0]
    assert (best.source, best.line_start, best.location, best.score > 0) == ("book.pdf", 2, "page 7", True)


async def test_vectors_of_another_model_are_computed_again(tmp_path, backend: Backend) -> None:
    async with scripted_model([]) as provider:
        url = {"OCTOLLM_EMBEDDING_URL": provider.url}
        async with serve(tmp_path, backend, OCTOLLM_EMBEDDING_MODEL="openai:one", **url) as search_kit:
            digest = await search_kit.write("red green blue")
            await search_kit.ready(digest)
        async with serve(tmp_path, backend, OCTOLLM_EMBEDDING_MODEL="openai:two", **url) as search_kit:
            # The first search makes the change known.
            found = await search_kit.find("red green")
            assert (found.vectors, found.reason, sources(found)) == ("partial", "pending", ["a.txt"])

            async def has_vectors() -> bool:
                return (await search_kit.find("red green")).vectors == "used"

            await wait_until(has_vectors, description="the vectors of the present model")
            assert sources(await search_kit.find("red green blue")) == ["a.txt"]
        assert [texts for texts in provider.embedded if texts == ("red green blue",)] == [("red green blue",)] * 3


@pytest.mark.parametrize(
    "query",
    [
        "",
        " ",
        "?!…—",
        '"',
        "a AND OR NOT (",
        "NEAR(pump, 5)",
        "pump*",
        "passage_terms: pump",
        "pump' OR 1=1; --",
        "🙂 pump",
        "\u202epump\u202c",
        "pump\x00oil",
        "%_\\",
        ":* & | !",
        "x" * 4000,
        "漢" * 4000,
        "pump " * 800,
    ],
)
async def test_no_query_breaks_the_search(search_kit: SearchKit, query: str) -> None:
    await search_kit.ready(await search_kit.write("The pump leaked oil."))
    found = await search_kit.find(query)
    assert ("pump" not in query.split()) or sources(found) == ["a.txt"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"query": "x" * 4001}, "/query"),
        ({"query": "x" * 20_000}, "/query"),
        ({"query": "x", "limit": 0}, "/limit"),
        ({"query": "x", "limit": 51}, "/limit"),
        ({"query": "x", "filters": {"languages": ["de"] * 65}}, "/filters/languages"),
        ({"query": "x", "filters": {"sources": ["n" * 256]}}, "/filters/sources"),
        ({"query": "x", "filters": {"media_types": ["a\x00b"]}}, "/filters/media_types"),
    ],
)
async def test_a_wrong_search_is_refused(search_kit: SearchKit, body: object, pointer: str) -> None:
    token = search_kit.harness.token("memory:read")
    answer = await search_kit.harness.send("memory", "POST", "/search", token=token, body=body)
    problem = msgspec.json.decode(answer.body, type=Problem)
    assert (answer.status, problem.code) == (400, "invalid_body")
    assert problem.errors is not None
    assert problem.errors[0].pointer == pointer


async def test_a_lone_surrogate_is_refused(search_kit: SearchKit) -> None:
    token = search_kit.harness.token("memory:read")
    answer = await search_kit.harness.send("memory", "POST", "/search", token=token, body=b'{"query": "\\ud800"}')
    assert answer.status == 400
