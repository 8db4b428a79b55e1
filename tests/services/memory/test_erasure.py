"""Erasure by fact, document, task and tenant: what goes, what stays, the counts, the record, and repeated calls."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from databases import Backend
from test_memory_facts import TASKS, Memory, problem

from octollm.config import read_settings
from octollm.contracts.memory_operations import Erasure
from octollm.contracts.operations import SearchResult
from octollm.errors import OctoError
from octollm.rpc.http_client import HttpResponse
from octollm.services.memory.service import memory_service
from octollm.storage.redis import open_redis
from octollm.testing.harness import Harness, start_harness


class Store(Memory):
    """Documents besides the facts."""

    async def put_document(self, text: str, *, task: str | None = None, sub: str = "user-1") -> str:
        digest = hashlib.sha256(text.encode()).hexdigest()
        body = {"name": "notes.txt", "text": text, "digest": digest}
        answer = await self.send("POST", "/documents", body, task=task, sub=sub)
        assert answer.status in (200, 201), answer.body
        return digest

    async def search(self, query: str) -> list[str]:
        answer = await self.send("POST", "/search", {"query": query})
        return [each.text for each in msgspec.json.decode(answer.body, type=SearchResult).passages]

    async def erase(self, path: str) -> Erasure:
        answer = await self.send("DELETE", path)
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body, type=Erasure)


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    async with start_harness() as harness:
        yield harness


@pytest.fixture
async def store(harness: Harness, tmp_path, backend: Backend) -> AsyncIterator[Store]:
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path), **backend.environment}, ())
    async with (
        open_redis("memory://") as redis,
        harness.serve(memory_service(harness.base("memory"), settings, redis=redis)),
    ):
        yield Store(harness)


def erased(answer: HttpResponse) -> Erasure:
    return msgspec.json.decode(answer.body, type=Erasure)


async def test_a_document_goes_with_what_is_known_from_it_alone(store: Store) -> None:
    digest = await store.put_document("The rate is 19 percent.\n")
    other = await store.put_document("The rate of books is 7 percent.\n")
    await store.put("only", 19, document=digest)
    await store.put("both", 7, document=digest, confidence=0.9, source="page 1")
    await store.put("both", 7, document=other, confidence=0.5, source="page 2")
    before = await store.get("both")
    assert len(await store.search("rate percent")) == 2

    assert await store.erase(f"/documents/{digest}") == Erasure(facts=1, sources=1, documents=1, passages=1, versions=1)
    assert (await store.send("GET", "/facts/only")).status == 404
    assert await store.search("rate percent") == ["The rate of books is 7 percent."]
    left = await store.get("both")
    assert (left.evidence, left.confidence, left.source) == (1, 0.5, "page 2")
    assert left.etag != before.etag
    assert (await store.send("DELETE", f"/documents/{digest}")).status == 404


async def test_a_task_goes_with_its_own_documents_and_facts(store: Store) -> None:
    own = await store.put_document("Only the first task read this.\n", task=TASKS[0])
    shared = await store.put_document("Both tasks read this.\n", task=TASKS[0])
    await store.put_document("Both tasks read this.\n", task=TASKS[1])
    await store.put("own", 1, task=TASKS[0])
    await store.put("own", 2, task=TASKS[0])
    await store.put("agreed", 1, task=TASKS[0])
    await store.put("agreed", 1, task=TASKS[1])
    # Another task states what it read in a document of the first.
    await store.put("derived", 1, task=TASKS[1], document=own)

    assert await store.erase(f"/tasks/{TASKS[0]}") == Erasure(facts=2, sources=2, documents=1, passages=1, versions=3)
    assert await store.search("tasks read") == ["Both tasks read this."]
    assert (await store.send("GET", f"/documents/{shared}")).status == 200
    assert [each.name for each in await store.list()] == ["agreed"]
    assert (await store.send("DELETE", f"/tasks/{TASKS[0]}")).status == 404
    assert (await store.erase(f"/tasks/{TASKS[1]}")).documents == 1
    assert await store.list() == []


async def test_a_fact_that_keeps_a_version_is_not_counted(store: Store) -> None:
    digest = await store.put_document("The rate is 19 percent.\n")
    await store.put("rate", 16)
    await store.put("rate", 19, document=digest)
    assert await store.erase(f"/documents/{digest}") == Erasure(0, 0, documents=1, passages=1, versions=1)
    assert (await store.get("rate")).value == 16


async def test_a_tenant_goes_as_a_whole_and_the_others_stay(store: Store) -> None:
    other = Store(store.harness, "other")
    for each in (store, other):
        for number in range(15):
            await each.put_document(f"Text number {number}.\n")
        for number in range(5):
            await each.put("n", number)
            await each.put(f"n{number}", number)
    assert await store.erase("/all") == Erasure(facts=6, sources=0, documents=15, passages=15, versions=10)
    assert await store.erase("/all") == Erasure(0, 0, 0, 0)
    assert (await store.list(), await store.search("text number")) == ([], [])
    assert (len(await other.list()), len(await other.search("text number"))) == (6, 5)


async def test_a_fact_goes_with_its_history(store: Store) -> None:
    await store.put("n", 1)
    await store.put("n", 2)
    assert await store.get("n")
    assert await store.erase("/facts/n") == Erasure(facts=1, sources=0, documents=0, passages=0, versions=2)
    for path in ("/facts/n", "/facts/n/history"):
        assert (await store.send("GET", path)).status == 404


async def test_what_is_erased_is_in_no_cache(store: Store) -> None:
    digest = await store.put_document("The launch code is written here.\n")
    await store.put("code", "x", document=digest)
    for _ in range(3):
        assert await store.search("launch code")
        assert (await store.get("code")).value == "x"
    assert (await store.erase(f"/documents/{digest}")).caches == "cleared"
    assert await store.search("launch code") == []
    assert (await store.send("GET", "/facts/code")).status == 404


async def test_a_repeated_erasure_with_a_key_gets_its_counts_again(store: Store) -> None:
    digest = await store.put_document("Erased once.\n")
    await store.put("n", 1, task=TASKS[0])
    for path, count in ((f"/documents/{digest}", 1), (f"/tasks/{TASKS[0]}", 1), ("/all", 0)):
        key = {"Idempotency-Key": f"key {path}"}
        first = await store.send("DELETE", path, **key)
        again = await store.send("DELETE", path, **key)
        assert (first.status, again.status) == (200, 200)
        assert erased(first) == erased(again)
        assert erased(first).documents + erased(first).facts == count
        assert again.headers["idempotent-replayed"] == "true"
    await store.put("n", 1)
    key = {"Idempotency-Key": "one more"}
    assert (await store.send("DELETE", "/facts/n", **key)).status == 200
    assert (await store.send("DELETE", "/facts/n", **key)).status == 200
    assert (await store.send("DELETE", "/facts/n")).status == 404


async def test_an_erasure_is_recorded_before_and_after(store: Store, harness: Harness) -> None:
    await store.put("n", 1)
    await store.erase("/facts/n")
    assert [(each.action, each.target) for each in harness.records.audited] == [
        ("memory.erasing", "fact n"),
        ("memory.erased", "fact n"),
    ]
    assert harness.records.audited[1].detail["facts"] == 1
    await store.put("n", 1)
    harness.records.audit_error = OctoError("The audit log is away.", code="state_conflict")
    answer = await store.send("DELETE", "/facts/n")
    assert problem(answer).code == "state_conflict"
    # What nobody can record does not happen.
    assert (await store.get("n")).value == 1
    harness.records.audit_error = None


async def test_a_document_that_a_task_stores_again_gets_that_source(store: Store) -> None:
    digest = await store.put_document("A text.\n", sub="user-1")
    for _ in range(2):
        await store.put_document("A text.\n", task=TASKS[0])
    # Its first source has no task, so it stays.
    assert await store.erase(f"/tasks/{TASKS[0]}") == Erasure(facts=0, sources=1, documents=0, passages=0)
    assert (await store.send("GET", f"/documents/{digest}")).status == 200


@pytest.mark.parametrize("path", ["/tasks/a%20b", "/tasks/%00", "/tasks/" + "x" * 129, "/documents/x"])
async def test_a_malformed_target_is_refused(store: Store, path: str) -> None:
    answer = await store.send("DELETE", path)
    assert (answer.status, problem(answer).code) == (400, "invalid_parameter")
