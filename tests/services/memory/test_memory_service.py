import hashlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from databases import Backend

from octollm.config import read_settings
from octollm.contracts.operations import DocumentList, DocumentOut, SearchResult
from octollm.contracts.problems import Problem
from octollm.errors import RemoteError
from octollm.rpc.http_client import HttpResponse
from octollm.services.memory.service import memory_service
from octollm.testing.harness import Harness, start_harness

GUIDE = """# Billing

The billing service exports invoices every night at 02:00.

# Access

Only members of the finance group may read invoices.
"""


@pytest.fixture
async def harness(tmp_path, backend: Backend) -> AsyncIterator[Harness]:
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path), **backend.environment}, ())
    async with start_harness() as harness, harness.serve(memory_service(harness.base("memory"), settings)):
        yield harness


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def document(text: str = GUIDE, name: str = "guide.md") -> dict[str, str]:
    return {"name": name, "text": text, "digest": digest(text)}


async def write(harness: Harness, body: object, **token: str) -> HttpResponse:
    return await harness.send("memory", "POST", "/documents", token=harness.token("memory:write", **token), body=body)


async def search(harness: Harness, query: str, *, tenant: str = "default", **more: object) -> SearchResult:
    token = harness.token("memory:read", tenant=tenant)
    answer = await harness.send("memory", "POST", "/search", token=token, body={"query": query, **more})
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body, type=SearchResult)


def problem(answer: HttpResponse) -> Problem:
    return msgspec.json.decode(answer.body, type=Problem)


async def test_a_document_is_found_by_its_words(harness: Harness) -> None:
    answer = await write(harness, document())
    assert answer.status == 201
    assert answer.headers["location"] == f"/documents/{digest(GUIDE)}"
    assert msgspec.json.decode(answer.body, type=DocumentOut) == DocumentOut(
        "guide.md", digest(GUIDE), 2, 7, "en", "text/markdown"
    )

    found = await search(harness, "When does it export invoices?")
    assert [(p.source, p.line_start, p.line_end) for p in found.passages] == [("guide.md", 1, 3), ("guide.md", 5, 7)]
    assert "02:00" in found.passages[0].text
    assert found.passages[0].score > found.passages[1].score > 0
    assert await search(harness, "zebra") == SearchResult((), "unused", "pending")


async def test_better_matches_come_first(harness: Harness) -> None:
    for n in range(6):
        await write(harness, document(f"Weather report number {n}.\n", f"weather{n}.txt"))
    await write(harness, document("The reactor core temperature is logged.\n", "core.txt"))
    await write(harness, document("The reactor core melts; reactor core alarms; core temperature.\n", "alarm.txt"))
    found = (await search(harness, "reactor core temperature alarm")).passages
    assert found[0].source == "alarm.txt"
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)


async def test_the_same_document_is_remembered_once(harness: Harness) -> None:
    assert (await write(harness, document())).status == 201
    assert (await write(harness, document())).status == 200
    assert (await write(harness, document(name="renamed.md"))).status == 200
    found = (await search(harness, "invoices")).passages
    assert [p.source for p in found] == ["renamed.md", "renamed.md"]


async def test_a_replaced_text_is_not_found_any_more(harness: Harness) -> None:
    await write(harness, document())
    await write(harness, {**document(), "text": "Nothing but penguins here."})
    assert (await search(harness, "invoices")).passages == ()
    assert len((await search(harness, "penguins")).passages) == 1


async def test_tenants_do_not_see_each_other(harness: Harness) -> None:
    await write(harness, document(), tenant="acme")
    assert (await search(harness, "invoices", tenant="other")).passages == ()
    token = harness.token("memory:read", tenant="other")
    for method, path in (("GET", f"/documents/{digest(GUIDE)}"), ("GET", "/facts/rate")):
        assert (await harness.send("memory", method, path, token=token)).status == 404
    writer = harness.token("memory:write", tenant="other")
    assert (await harness.send("memory", "DELETE", f"/documents/{digest(GUIDE)}", token=writer)).status == 404
    assert len((await search(harness, "invoices", tenant="acme")).passages) == 2


async def test_other_tenants_do_not_change_a_score(harness: Harness) -> None:
    await write(harness, document(), tenant="acme")
    before = await search(harness, "finance invoices", tenant="acme")
    await write(harness, document("Invoices, invoices, finance.\n" * 20), tenant="other")
    assert await search(harness, "finance invoices", tenant="acme") == before


async def test_where_many_match_the_best_still_come_first(harness: Harness) -> None:
    await write(
        harness, document("\n\n".join(f"# Entry {n}\n\nThe pump {n} was checked." for n in range(600)), "log.md")
    )
    await write(harness, document("The pump leaked oil.", "leak.md"))
    found = (await search(harness, "which pump leaked oil?", limit=50)).passages
    assert len(found) == 50
    assert found[0].source == "leak.md"


async def test_a_search_is_narrowed_to_digests(harness: Harness) -> None:
    await write(harness, document())
    other = "Invoices are printed on paper.\n"
    await write(harness, document(other, "paper.txt"))
    found = await search(harness, "invoices", filters={"digests": [digest(other)]})
    assert [p.source for p in found.passages] == ["paper.txt"]


@pytest.mark.parametrize("query", ['"', "a AND", "NEAR(", "text:invoices", "*", "^x", "' OR 1=1 --", "\x00x", "émigré"])
async def test_no_query_is_an_error(harness: Harness, query: str) -> None:
    await write(harness, document())
    assert isinstance(await search(harness, query), SearchResult)


async def test_documents_are_listed_in_pages(harness: Harness) -> None:
    for n in range(5):
        await write(harness, document(f"Text {n}.", f"{n}.txt"))
    token = harness.token("memory:read")
    names: list[str] = []
    cursor = ""
    while True:
        answer = await harness.send("memory", "GET", f"/documents?limit=2{cursor}", token=token)
        page = msgspec.json.decode(answer.body, type=DocumentList)
        names += [d.name for d in page.documents]
        if page.cursor is None:
            break
        cursor = f"&cursor={page.cursor}"
    assert names == ["4.txt", "3.txt", "2.txt", "1.txt", "0.txt"]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "limit=-1", "cursor=%21", "cursor=W10"])
async def test_a_wrong_page_is_refused(harness: Harness, query: str) -> None:
    answer = await harness.send("memory", "GET", f"/documents?{query}", token=harness.token("memory:read"))
    assert (answer.status, problem(answer).code) == (400, "invalid_parameter")


async def test_a_document_has_an_etag_and_can_be_forgotten(harness: Harness) -> None:
    await write(harness, document())
    path, token = f"/documents/{digest(GUIDE)}", harness.token("memory:read")
    answer = await harness.send("memory", "GET", path, token=token)
    etag = answer.headers["etag"]
    again = await harness.send("memory", "GET", path, token=token, headers={"If-None-Match": etag})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    await write(harness, document(name="renamed.md"))
    assert (await harness.send("memory", "GET", path, token=token, headers={"If-None-Match": etag})).status == 200

    writer = harness.token("memory:write")
    assert (await harness.send("memory", "DELETE", path, token=writer)).status == 200
    assert (await harness.send("memory", "DELETE", path, token=writer)).status == 404
    assert (await search(harness, "invoices")).passages == ()


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"name": "x", "text": "y", "digest": "z"}, "/digest"),
        ({"name": "", "text": "y", "digest": "0" * 64}, "/name"),
        ({"name": "x", "text": "y"}, ""),
    ],
)
async def test_a_wrong_document_is_refused(harness: Harness, body: object, pointer: str) -> None:
    answer = await write(harness, body)
    assert (answer.status, problem(answer).code) == (400, "invalid_body")
    assert problem(answer).errors[0].pointer == pointer


async def test_binary_is_no_document(harness: Harness) -> None:
    assert problem(await write(harness, document("a\x00b"))).code == "file_invalid"


@pytest.mark.parametrize("body", [{"query": "x", "limit": 0}, {"query": "x", "limit": 51}, {"query": "x" * 4001}, {}])
async def test_a_wrong_search_is_refused(harness: Harness, body: object) -> None:
    answer = await harness.send("memory", "POST", "/search", token=harness.token("memory:read"), body=body)
    assert problem(answer).code == "invalid_body"


@pytest.mark.parametrize("scope", ["memory:read:task.x", "memory:read:*", "memory:write"])
async def test_a_narrower_or_other_scope_does_not_open_the_whole(harness: Harness, scope: str) -> None:
    token = harness.token(scope)
    for method, path, body in (("POST", "/search", {"query": "x"}), ("GET", "/documents", None)):
        answer = await harness.send("memory", method, path, token=token, body=body)
        assert (answer.status, problem(answer).code) == (403, "scope_missing")


async def test_a_scope_for_one_document_opens_that_one(harness: Harness) -> None:
    await write(harness, document())
    token = harness.token(f"memory:read:{digest(GUIDE)}")
    assert (await harness.send("memory", "GET", f"/documents/{digest(GUIDE)}", token=token)).status == 200
    assert (await harness.send("memory", "GET", f"/documents/{'0' * 64}", token=token)).status == 403


async def test_the_wrong_token_is_refused(harness: Harness) -> None:
    wrong_audience = harness.token("retriever:search")
    answer = await harness.send("memory", "POST", "/search", token=wrong_audience, body={"query": "x"})
    assert (answer.status, problem(answer).code) == (401, "token_invalid")
    answer = await harness.send("memory", "POST", "/search", body={"query": "x"})
    assert (answer.status, problem(answer).code) == (401, "token_missing")
    reader = harness.token("memory:read")
    answer = await harness.send("memory", "POST", "/documents", token=reader, body=document())
    assert (answer.status, problem(answer).code) == (403, "scope_missing")


async def test_it_describes_itself(harness: Harness) -> None:
    ready = await harness.send("memory", "GET", "/ready")
    dependencies = msgspec.json.decode(ready.body)["dependencies"]
    assert dependencies["database"].pop("latency_ms") >= 0
    assert (ready.status, dependencies["database"]) == (200, {"ok": True})
    # Nobody takes its traces here, which keeps it from nothing.
    assert dependencies["traces"]["required"] is False
    described = await harness.send("memory", "GET", "/openapi.json")
    assert "/facts/{name}" in msgspec.json.decode(described.body)["paths"]


async def test_what_was_remembered_outlives_the_service(tmp_path) -> None:
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, ())
    async with start_harness() as harness:
        async with harness.serve(memory_service(harness.base("memory"), settings)):
            await write(harness, document())
        async with harness.serve(memory_service(harness.base("memory"), settings)):
            assert len((await search(harness, "invoices")).passages) == 2


async def test_a_damaged_database_is_refused_at_the_start(tmp_path) -> None:
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, ())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "memory.db").write_bytes(b"no database" * 1000)
    async with start_harness() as harness:
        with pytest.raises(Exception, match="damaged") as caught:
            async with harness.serve(memory_service(harness.base("memory"), settings)):
                pass
        assert not isinstance(caught.value, RemoteError)
