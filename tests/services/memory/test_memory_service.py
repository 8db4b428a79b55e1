import hashlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from databases import Backend

from octollm.config import read_settings
from octollm.contracts.operations import DocumentList, DocumentOut, Fact, SearchResult
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
async def house(tmp_path, backend: Backend) -> AsyncIterator[Harness]:
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path), **backend.environment}, ())
    async with start_harness() as house, house.serve(memory_service(house.base("memory"), settings)):
        yield house


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def document(text: str = GUIDE, name: str = "guide.md") -> dict[str, str]:
    return {"name": name, "text": text, "digest": digest(text)}


async def write(house: Harness, body: object, **token: str) -> HttpResponse:
    return await house.send("memory", "POST", "/documents", token=house.token("memory:write", **token), body=body)


async def search(house: Harness, query: str, *, tenant: str = "default", **more: object) -> SearchResult:
    token = house.token("memory:read", tenant=tenant)
    answer = await house.send("memory", "POST", "/search", token=token, body={"query": query, **more})
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body, type=SearchResult)


def problem(answer: HttpResponse) -> Problem:
    return msgspec.json.decode(answer.body, type=Problem)


async def test_a_document_is_found_by_its_words(house: Harness) -> None:
    answer = await write(house, document())
    assert answer.status == 201
    assert answer.headers["location"] == f"/documents/{digest(GUIDE)}"
    assert msgspec.json.decode(answer.body, type=DocumentOut) == DocumentOut("guide.md", digest(GUIDE), 2, 7)

    found = await search(house, "When does it export invoices?")
    assert [(p.source, p.line_start, p.line_end) for p in found.passages] == [("guide.md", 1, 3), ("guide.md", 5, 7)]
    assert "02:00" in found.passages[0].text
    assert found.passages[0].score > found.passages[1].score > 0
    assert await search(house, "zebra") == SearchResult(())


async def test_better_matches_come_first(house: Harness) -> None:
    for n in range(6):
        await write(house, document(f"Weather report number {n}.\n", f"weather{n}.txt"))
    await write(house, document("The reactor core temperature is logged.\n", "core.txt"))
    await write(house, document("The reactor core melts; reactor core alarms; core temperature.\n", "alarm.txt"))
    found = (await search(house, "reactor core temperature alarm")).passages
    assert found[0].source == "alarm.txt"
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)


async def test_the_same_document_is_remembered_once(house: Harness) -> None:
    assert (await write(house, document())).status == 201
    assert (await write(house, document())).status == 200
    assert (await write(house, document(name="renamed.md"))).status == 200
    found = (await search(house, "invoices")).passages
    assert [p.source for p in found] == ["renamed.md", "renamed.md"]


async def test_a_replaced_text_is_not_found_any_more(house: Harness) -> None:
    await write(house, document())
    await write(house, {**document(), "text": "Nothing but penguins here."})
    assert (await search(house, "invoices")).passages == ()
    assert len((await search(house, "penguins")).passages) == 1


async def test_tenants_do_not_see_each_other(house: Harness) -> None:
    await write(house, document(), tenant="acme")
    assert (await search(house, "invoices", tenant="other")).passages == ()
    token = house.token("memory:read", tenant="other")
    for method, path in (("GET", f"/documents/{digest(GUIDE)}"), ("GET", "/facts/rate")):
        assert (await house.send("memory", method, path, token=token)).status == 404
    writer = house.token("memory:write", tenant="other")
    assert (await house.send("memory", "DELETE", f"/documents/{digest(GUIDE)}", token=writer)).status == 404
    assert len((await search(house, "invoices", tenant="acme")).passages) == 2


async def test_other_tenants_do_not_change_a_score(house: Harness) -> None:
    await write(house, document(), tenant="acme")
    before = await search(house, "finance invoices", tenant="acme")
    await write(house, document("Invoices, invoices, finance.\n" * 20), tenant="other")
    assert await search(house, "finance invoices", tenant="acme") == before


async def test_where_many_match_the_best_still_come_first(house: Harness) -> None:
    await write(house, document("\n\n".join(f"# Entry {n}\n\nThe pump {n} was checked." for n in range(600)), "log.md"))
    await write(house, document("The pump leaked oil.", "leak.md"))
    found = (await search(house, "which pump leaked oil?", limit=50)).passages
    assert len(found) == 50
    assert found[0].source == "leak.md"


async def test_a_search_is_narrowed_to_digests(house: Harness) -> None:
    await write(house, document())
    other = "Invoices are printed on paper.\n"
    await write(house, document(other, "paper.txt"))
    found = await search(house, "invoices", filters={"digests": [digest(other)]})
    assert [p.source for p in found.passages] == ["paper.txt"]


@pytest.mark.parametrize("query", ['"', "a AND", "NEAR(", "text:invoices", "*", "^x", "' OR 1=1 --", "\x00x", "émigré"])
async def test_no_query_is_an_error(house: Harness, query: str) -> None:
    await write(house, document())
    assert isinstance(await search(house, query), SearchResult)


async def test_documents_are_listed_in_pages(house: Harness) -> None:
    for n in range(5):
        await write(house, document(f"Text {n}.", f"{n}.txt"))
    token = house.token("memory:read")
    names: list[str] = []
    cursor = ""
    while True:
        answer = await house.send("memory", "GET", f"/documents?limit=2{cursor}", token=token)
        page = msgspec.json.decode(answer.body, type=DocumentList)
        names += [d.name for d in page.documents]
        if page.cursor is None:
            break
        cursor = f"&cursor={page.cursor}"
    assert names == ["4.txt", "3.txt", "2.txt", "1.txt", "0.txt"]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "limit=-1", "cursor=%21", "cursor=W10"])
async def test_a_wrong_page_is_refused(house: Harness, query: str) -> None:
    answer = await house.send("memory", "GET", f"/documents?{query}", token=house.token("memory:read"))
    assert (answer.status, problem(answer).code) == (400, "invalid_parameter")


async def test_a_document_has_an_etag_and_can_be_forgotten(house: Harness) -> None:
    await write(house, document())
    path, token = f"/documents/{digest(GUIDE)}", house.token("memory:read")
    answer = await house.send("memory", "GET", path, token=token)
    etag = answer.headers["etag"]
    again = await house.send("memory", "GET", path, token=token, headers={"If-None-Match": etag})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    await write(house, document(name="renamed.md"))
    assert (await house.send("memory", "GET", path, token=token, headers={"If-None-Match": etag})).status == 200

    writer = house.token("memory:write")
    assert (await house.send("memory", "DELETE", path, token=writer)).status == 204
    assert (await house.send("memory", "DELETE", path, token=writer)).status == 404
    assert (await search(house, "invoices")).passages == ()


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"name": "x", "text": "y", "digest": "z"}, "/digest"),
        ({"name": "", "text": "y", "digest": "0" * 64}, "/name"),
        ({"name": "x", "text": "y"}, ""),
    ],
)
async def test_a_wrong_document_is_refused(house: Harness, body: object, pointer: str) -> None:
    answer = await write(house, body)
    assert (answer.status, problem(answer).code) == (400, "invalid_body")
    assert problem(answer).errors[0].pointer == pointer


async def test_binary_is_no_document(house: Harness) -> None:
    assert problem(await write(house, document("a\x00b"))).code == "file_invalid"


@pytest.mark.parametrize("body", [{"query": "x", "limit": 0}, {"query": "x", "limit": 51}, {"query": "x" * 4001}, {}])
async def test_a_wrong_search_is_refused(house: Harness, body: object) -> None:
    answer = await house.send("memory", "POST", "/search", token=house.token("memory:read"), body=body)
    assert problem(answer).code == "invalid_body"


async def test_facts_are_set_read_and_forgotten(house: Harness) -> None:
    reader, writer = house.token("memory:read"), house.token("memory:write")

    async def put(value: object, **headers: str) -> HttpResponse:
        return await house.send(
            "memory", "PUT", "/facts/rate", token=writer, body={"value": value, "source": "law"}, headers=headers
        )

    assert (await house.send("memory", "GET", "/facts/rate", token=reader)).status == 404
    assert (await put({"vat": 1})).status == 201
    first = await put({"vat": 1})
    assert (first.status, first.headers["etag"]) == (200, '"1"')
    assert (await put({"vat": True})).headers["etag"] == '"2"'
    answer = await house.send("memory", "GET", "/facts/rate", token=reader)
    fact = msgspec.json.decode(answer.body, type=Fact)
    assert (fact.name, fact.value, fact.source, fact.version) == ("rate", {"vat": True}, "law", 2)
    assert problem(await put(3, **{"If-Match": '"1"'})).code == "state_conflict"
    assert (await put(3, **{"If-Match": '"2"'})).status == 200
    assert problem(await put(3, **{"If-Match": "x"})).code == "invalid_header"
    assert problem(await put(None)).code == "invalid_body"
    assert (await house.send("memory", "DELETE", "/facts/rate", token=writer)).status == 204
    assert (await house.send("memory", "GET", "/facts/rate", token=reader)).status == 404


@pytest.mark.parametrize("name", ["A", "a%2Fb", "a%20b", "a" * 256])
async def test_a_fact_has_a_plain_name(house: Harness, name: str) -> None:
    answer = await house.send("memory", "GET", f"/facts/{name}", token=house.token("memory:read"))
    assert answer.status in (400, 404)


@pytest.mark.parametrize("scope", ["memory:read:task.x", "memory:read:*", "memory:write"])
async def test_a_narrower_or_other_scope_does_not_open_the_whole(house: Harness, scope: str) -> None:
    token = house.token(scope)
    for method, path, body in (("POST", "/search", {"query": "x"}), ("GET", "/documents", None)):
        answer = await house.send("memory", method, path, token=token, body=body)
        assert (answer.status, problem(answer).code) == (403, "scope_missing")


async def test_a_scope_for_one_document_opens_that_one(house: Harness) -> None:
    await write(house, document())
    token = house.token(f"memory:read:{digest(GUIDE)}")
    assert (await house.send("memory", "GET", f"/documents/{digest(GUIDE)}", token=token)).status == 200
    assert (await house.send("memory", "GET", f"/documents/{'0' * 64}", token=token)).status == 403


async def test_the_wrong_token_is_refused(house: Harness) -> None:
    wrong_audience = house.token("retriever:search")
    answer = await house.send("memory", "POST", "/search", token=wrong_audience, body={"query": "x"})
    assert (answer.status, problem(answer).code) == (401, "token_invalid")
    answer = await house.send("memory", "POST", "/search", body={"query": "x"})
    assert (answer.status, problem(answer).code) == (401, "token_missing")
    reader = house.token("memory:read")
    answer = await house.send("memory", "POST", "/documents", token=reader, body=document())
    assert (answer.status, problem(answer).code) == (403, "scope_missing")


async def test_it_describes_itself(house: Harness) -> None:
    ready = await house.send("memory", "GET", "/ready")
    dependencies = msgspec.json.decode(ready.body)["dependencies"]
    assert dependencies["database"].pop("latency_ms") >= 0
    assert (ready.status, dependencies["database"]) == (200, {"ok": True})
    # Nobody takes its traces here, which keeps it from nothing.
    assert dependencies["traces"]["required"] is False
    described = await house.send("memory", "GET", "/openapi.json")
    assert "/facts/{name}" in msgspec.json.decode(described.body)["paths"]


async def test_what_was_remembered_outlives_the_service(tmp_path) -> None:
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, ())
    async with start_harness() as house:
        async with house.serve(memory_service(house.base("memory"), settings)):
            await write(house, document())
        async with house.serve(memory_service(house.base("memory"), settings)):
            assert len((await search(house, "invoices")).passages) == 2


async def test_a_damaged_database_is_refused_at_the_start(tmp_path) -> None:
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, ())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "memory.db").write_bytes(b"no database" * 1000)
    async with start_harness() as house:
        with pytest.raises(Exception, match="damaged") as caught:
            async with house.serve(memory_service(house.base("memory"), settings)):
                pass
        assert not isinstance(caught.value, RemoteError)
