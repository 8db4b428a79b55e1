"""Facts over HTTP, on both databases: supersession, evidence, validity, preconditions, lists, and hostile texts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from databases import Backend

from octollm.config import read_settings
from octollm.contracts.memory_operations import Fact, FactHistory, FactList
from octollm.contracts.problems import Problem
from octollm.rpc.http_client import HttpResponse
from octollm.services.memory import facts
from octollm.services.memory.service import memory_service
from octollm.testing.harness import Harness, start_harness

TASKS = ["task-" + digit * 32 for digit in "123"]


class Memory:
    """The facts of a tenant, as one principal sees them."""

    def __init__(self, harness: Harness, tenant: str = "default") -> None:
        self.harness = harness
        self.tenant = tenant

    async def send(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        scope: str = "memory:read memory:write memory:erase",
        task: str | None = None,
        sub: str = "user-1",
        **headers: str,
    ) -> HttpResponse:
        token = self.harness.token(scope, tenant=self.tenant, task=task, sub=sub)
        return await self.harness.send("memory", method, path, token=token, body=body, headers=headers)

    async def put(self, name: str, value: object, *, task: str | None = None, sub: str = "user-1", **more: Any) -> Fact:
        subject = more.pop("subject", "")
        path = f"/facts/{name}?subject={quote(subject, safe='')}"
        answer = await self.send("PUT", path, {"value": value, **more}, task=task, sub=sub)
        assert answer.status in (200, 201), answer.body
        return msgspec.json.decode(answer.body, type=Fact)

    async def get(self, name: str, query: str = "") -> Fact:
        answer = await self.send("GET", f"/facts/{name}{query}")
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body, type=Fact)

    async def list(self, query: str = "") -> list[Fact]:
        answer = await self.send("GET", f"/facts?{query}")
        assert answer.status == 200, answer.body
        return list(msgspec.json.decode(answer.body, type=FactList).facts)

    async def history(self, name: str) -> FactHistory:
        answer = await self.send("GET", f"/facts/{name}/history")
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body, type=FactHistory)


def problem(answer: HttpResponse) -> Problem:
    return msgspec.json.decode(answer.body, type=Problem)


@pytest.fixture
async def memory(tmp_path, backend: Backend) -> AsyncIterator[Memory]:
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path), **backend.environment}, ())
    async with start_harness() as harness, harness.serve(memory_service(harness.base("memory"), settings)):
        yield Memory(harness)


async def test_a_newer_value_supersedes_and_the_history_stays(memory: Memory) -> None:
    first = await memory.put("capital", "Bonn", source="atlas 1980")
    assert (first.version, first.confidence, first.evidence) == (1, 1.0, 1)
    second = await memory.put("capital", "Berlin", confidence=0.9)
    assert await memory.get("capital") == second
    assert second.version == 2
    versions = (await memory.history("capital")).versions
    assert [(each.fact.value, each.fact.source) for each in versions] == [("Berlin", ""), ("Bonn", "atlas 1980")]
    assert [source.principal for source in versions[0].sources] == ["user-1"]
    assert (await memory.get("capital", f"?at={first.valid_from}")).value in ("Bonn", "Berlin")


async def test_the_same_value_is_one_fact_with_more_evidence(memory: Memory) -> None:
    first = await memory.put("rate", {"vat": 19, "name": "Mehrwertsteuer  19"}, task=TASKS[0], confidence=0.5)
    # The same again, and the same in other words of JSON, change nothing.
    same = {"name": "Mehrwertsteuer 19", "vat": 19.0}
    assert await memory.put("rate", same, task=TASKS[0], confidence=0.5) == first
    second = await memory.put("rate", same, task=TASKS[1], confidence=0.8)
    assert (second.evidence, second.confidence, second.version) == (2, 0.8, 2)
    assert await memory.put("rate", same, task=TASKS[0], confidence=0.5) == second
    lower = await memory.put("rate", same, task=TASKS[1], confidence=0.1)
    assert (lower.evidence, lower.confidence) == (2, 0.5)
    [version] = (await memory.history("rate")).versions
    assert {source.task for source in version.sources} == set(TASKS[:2])


async def test_true_and_one_are_two_values(memory: Memory) -> None:
    await memory.put("flag", 1)
    assert (await memory.put("flag", True)).version == 2


async def test_a_fact_is_valid_for_its_time(memory: Memory) -> None:
    await memory.put("price", 10, valid_from="2020-01-01T00:00:00Z")
    await memory.put("price", 12, valid_from="2022-01-01T00:00:00Z", valid_until="2023-01-01T00:00:00+00:00")
    # Learned last, and true before the others.
    await memory.put("price", 8, valid_from="2018-01-01T00:00:00Z")
    wanted = {"2017-06-01": None, "2019-06-01": 8, "2021-06-01": 10, "2022-06-01": 12, "2023-06-01": None}
    for day, value in wanted.items():
        answer = await memory.send("GET", f"/facts/price?at={day}T00:00:00Z")
        assert (answer.status == 404) is (value is None)
        found = await memory.list(f"at={day}T00:00:00Z")
        assert [each.value for each in found] == ([] if value is None else [value])
    assert (await memory.send("GET", "/facts/price")).status == 404
    # A time that was read can be written back.
    version = (await memory.history("price")).versions[0].fact
    assert (await memory.put("price", 8, valid_from=version.valid_from)).version == version.version


async def test_a_change_can_have_a_precondition(memory: Memory) -> None:
    first = await memory.put("lock", 1)
    stale = await memory.send("PUT", "/facts/lock", {"value": 2}, **{"If-None-Match": "*"})
    assert (stale.status, problem(stale).code) == (409, "state_conflict")
    changed = await memory.send("PUT", "/facts/lock", {"value": 2}, **{"If-Match": first.etag})
    assert changed.status == 200
    for method, body in (("PUT", {"value": 3}), ("DELETE", None)):
        stale = await memory.send(method, "/facts/lock", body, **{"If-Match": first.etag})
        assert (stale.status, problem(stale).code) == (409, "state_conflict")
        wrong = await memory.send(method, "/facts/lock", body, **{"If-Match": "W/x"})
        assert problem(wrong).code == "invalid_header"
        missing = await memory.send(method, "/facts/missing", body, **{"If-Match": "*"})
        assert problem(missing).code == "state_conflict"
    etag = changed.headers["etag"]
    again = await memory.send("GET", "/facts/lock", **{"If-None-Match": etag})
    assert again.status == 304
    assert (await memory.send("DELETE", "/facts/lock", **{"If-Match": etag})).status == 200
    # A fact that was set anew is not the one that was read.
    await memory.put("lock", 1)
    assert (await memory.send("PUT", "/facts/lock", {"value": 9}, **{"If-Match": first.etag})).status == 409


async def test_concurrent_statements_lose_nothing(memory: Memory) -> None:
    await asyncio.gather(*(memory.put("count", number) for number in range(12)))
    versions = (await memory.history("count")).versions
    assert sorted(each.fact.value for each in versions) == list(range(12))
    assert [each.fact.version for each in versions] == list(range(12, 0, -1))
    await asyncio.gather(*(memory.put("agreed", "yes", sub=f"user-{number}") for number in range(12)))
    assert (await memory.get("agreed")).evidence == 12


async def test_facts_are_listed_filtered_and_searched(memory: Memory) -> None:
    await memory.put("city", "Köln", subject="Kunde 7", confidence=0.4)
    await memory.put("city", "東京都", subject="顧客 8")
    await memory.put("size", {"employees": 120, "note": "50% off_season"}, subject="Kunde 7", task=TASKS[2])
    await memory.put("rules.vat", 19)

    async def names(query: str) -> list[str]:
        return [f"{each.subject}/{each.name}" for each in await memory.list(query)]

    assert await names("") == ["/rules.vat", "Kunde 7/size", "顧客 8/city", "Kunde 7/city"]
    assert await names(f"subject={quote('Kunde 7')}") == ["Kunde 7/size", "Kunde 7/city"]
    assert await names("subject=") == ["/rules.vat"]
    assert await names("prefix=rules.") == ["/rules.vat"]
    assert await names("prefix=rules_") == []
    assert await names(f"q={quote('KÖLN kunde')}") == ["Kunde 7/city"]
    assert await names(f"q={quote('東京')}") == ["顧客 8/city"]
    assert await names(f"q={quote('50% off_')}") == ["Kunde 7/size"]
    assert await names(f"q={quote('5_% ')}") == []
    assert await names("min_confidence=0.5&prefix=city") == ["顧客 8/city"]
    assert await names(f"task={TASKS[2]}") == ["Kunde 7/size"]
    pages, cursor = [], ""
    while True:
        answer = await memory.send("GET", f"/facts?limit=3{cursor}")
        page = msgspec.json.decode(answer.body, type=FactList)
        pages += [each.name for each in page.facts]
        if page.cursor is None:
            break
        cursor = f"&cursor={page.cursor}"
    assert pages == ["rules.vat", "size", "city", "city"]
    found = await memory.send("POST", "/facts/query", {"q": "vat"}, scope="memory:query_facts")
    assert [each.name for each in msgspec.json.decode(found.body, type=FactList).facts] == ["rules.vat"]


HOSTILE = [
    "a/b", "../../etc/passwd", "%2e%2e", "a b", "'; DROP TABLE fact_versions; --", "日本語", "\u202egnp.exe", "é",
    "{}[]*?", "octollm:cache:*", "x" * 255,
]  # fmt: skip


async def test_a_subject_may_be_any_text(memory: Memory) -> None:
    for subject in HOSTILE:
        stored = await memory.put("name", "x", subject=subject)
        path = f"/facts/name?subject={quote(subject, safe='')}"
        answer = await memory.send("GET", path)
        assert msgspec.json.decode(answer.body, type=Fact) == stored
        assert stored.subject == subject
        assert (await memory.send("GET", "/facts/name")).status == 404
        assert (await memory.send("DELETE", path)).status == 200


async def test_two_encodings_of_a_text_are_one_subject(memory: Memory) -> None:
    await memory.put("name", 1, subject="Caf\u00e9")
    assert (await memory.put("name", 2, subject="Cafe\u0301")).version == 2


async def test_a_hostile_address_is_refused(memory: Memory) -> None:
    for query in ["subject=%00", "subject=%1b%5b31m", "subject=" + "x" * 256, "at=yesterday", "at=1"]:
        answer = await memory.send("GET", f"/facts/name?{query}")
        assert (answer.status, problem(answer).code) == (400, "invalid_parameter")


async def test_a_hostile_list_is_no_failure(memory: Memory) -> None:
    for query in ["q=%00", "prefix=%00", "task=%00", "document=%00", "cursor=x", "min_confidence=2"]:
        answer = await memory.send("GET", f"/facts?{query}")
        assert answer.status == 200 or (answer.status, problem(answer).code) == (400, "invalid_parameter")


async def test_a_fact_has_a_plain_name(memory: Memory) -> None:
    for name in ["A", "a%2Fb", "a%20b", "a" * 256]:
        answer = await memory.send("GET", f"/facts/{name}")
        assert answer.status in (400, 404)


UNSTORABLE = [
    (b'{"value": null}', "/value"),
    (b'{"value": "a\\u0000b"}', "/value"),
    (b'{"value": 1e999}', ""),
    (b'{"value": ' + b"9" * 40 + b"}", "/value"),
    (b'{"value": "\\ud800"}', ""),
    (b'{"value": ' + b"[" * 40 + b"]" * 40 + b"}", "/value"),
    (b'{"value": ' + b"[" * 9000 + b"]" * 9000 + b"}", ""),
    (b'{"value": 1, "confidence": 1.5}', "/confidence"),
    (b'{"value": 1, "confidence": -0.1}', "/confidence"),
    (b'{"value": 1, "source": "a\\u0000"}', "/source"),
    (b'{"value": 1, "document": "x"}', "/document"),
    (b'{"value": 1, "document": "' + b"0" * 64 + b'"}', "/document"),
    (b'{"value": 1, "valid_from": "2030-01-01"}', "/valid_from"),
    (b'{"value": 1, "valid_from": "9999-12-31T23:59:59-23:59"}', "/valid_from"),
    (b'{"value": 1, "valid_until": "2000-01-01T00:00:00Z"}', "/valid_until"),
]


async def test_what_cannot_be_stored_is_refused_with_its_place(memory: Memory) -> None:
    for body, pointer in UNSTORABLE:
        answer = await memory.send("PUT", "/facts/odd", body)
        assert answer.status == 400, (body, answer.body)
        if pointer:
            assert [each.pointer for each in problem(answer).errors] == [pointer]


async def test_the_history_is_bounded(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MAX_VERSIONS", 5)
    for number in range(8):
        await memory.put("n", number)
    assert [each.fact.value for each in (await memory.history("n")).versions] == [7, 6, 5, 4, 3]


async def test_a_tenant_has_a_bounded_number_of_facts(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MAX_FACTS", 2)
    await memory.put("a", 1)
    await memory.put("b", 1)
    assert (await memory.put("a", 2)).version == 2
    refused = await memory.send("PUT", "/facts/c", {"value": 1})
    assert (refused.status, problem(refused).code) == (409, "state_conflict")
    await Memory(memory.harness, "other").put("c", 1)


async def test_another_tenant_sees_nothing(memory: Memory) -> None:
    fact = await memory.put("secret", "x", task=TASKS[0])
    other = Memory(memory.harness, "other")
    for method, path in (
        ("GET", "/facts/secret"),
        ("GET", "/facts/secret/history"),
        ("DELETE", "/facts/secret"),
        ("DELETE", f"/tasks/{TASKS[0]}"),
        ("DELETE", f"/documents/{hashlib.sha256(b'x').hexdigest()}"),
    ):
        assert (await other.send(method, path)).status == 404, path
    assert await other.list() == []
    assert (await other.send("PUT", "/facts/secret", {"value": 2}, **{"If-Match": fact.etag})).status == 409
    assert (await other.put("secret", "mine")).version == 1
    assert await memory.get("secret") == fact


async def test_scopes_are_kept_apart(memory: Memory) -> None:
    await memory.put("a", 1)
    for scope, method, path in (
        ("memory:read", "DELETE", "/facts/a"),
        ("memory:write", "GET", "/facts/a"),
        ("memory:read memory:write", "DELETE", "/all"),
        ("memory:query_facts", "GET", "/facts"),
    ):
        answer = await memory.send(method, path, scope=scope)
        assert (answer.status, problem(answer).code) == (403, "scope_missing"), path
