from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import served
from wires import CURRENT

from octollm.rpc.call import IncomingCall, Operation, OperationResponse
from octollm.rpc.http_client import ETagCache, HttpResponse, cache_key
from octollm.rpc.responses import BufferedResponse, apply_etag


class State(msgspec.Struct):
    number: int


def answer(body: bytes = b"{}", **headers: str) -> BufferedResponse:
    return BufferedResponse.from_json(200, body, headers)


@pytest.mark.parametrize(
    ("held", "holds"),
    [
        (None, False),
        (b'"a"', True),
        (b'W/"a"', True),
        (b"*", True),
        (b'"b", "a"', True),
        (b'"b",W/"a" , "c"', True),
        (b'"b"', False),
        (b"a", False),
        (b'"', False),
        (b"", False),
        (b'"aa"', False),
    ],
)
def test_which_tags_an_answer_is_known_by(held: bytes | None, holds: bool) -> None:
    found = apply_etag(answer(ETag='"a"'), held)
    assert found.status_code == (304 if holds else 200)
    assert bytes(found.body) == (b"" if holds else b"{}")
    assert (b"etag", b'"a"') in found.raw_headers


def test_what_is_compressed_is_the_same_answer() -> None:
    assert apply_etag(answer(ETag='W/"a"'), b'"a"').status_code == 304


def test_a_tag_is_made_of_the_body_and_other_statuses_have_none() -> None:
    first, same, other = (dict(apply_etag(answer(body), None).raw_headers) for body in (b"1", b"1", b"2"))
    assert first[b"etag"] == same[b"etag"] != other[b"etag"]
    assert first[b"cache-control"] == b"private, no-cache"
    assert b"etag" not in dict(apply_etag(BufferedResponse.from_json(201, b"1"), None).raw_headers)


@given(st.binary(max_size=200))
def test_any_header_is_read(held: bytes) -> None:
    assert apply_etag(answer(ETag='"a"'), held).status_code in (200, 304)


def kept_answer(tag: str, body: bytes = b"x", **headers: str) -> HttpResponse:
    return HttpResponse(200, {"etag": tag, **headers}, body)


def test_what_is_kept_is_asked_for_again_and_given_when_it_holds() -> None:
    kept = ETagCache()
    key = cache_key("svc/op", "bearer")
    assert kept.store(key, kept.add_validator(key, {}), kept_answer('"1"')).body == b"x"
    headers: dict[str, str] = {}
    held = kept.add_validator(key, headers)
    assert headers == {"If-None-Match": '"1"'}
    found = kept.store(key, held, HttpResponse(304, {"etag": '"1"', "x-request-id": "2", "content-length": "0"}, b""))
    assert (found.status, found.body, found.headers["x-request-id"]) == (200, b"x", "2")
    assert "content-length" not in found.headers
    # Nothing is shown to another bearer, and a caller's own condition is left alone.
    assert kept.add_validator(cache_key("svc/op", "another"), {}) is None
    assert kept.add_validator(key, {"If-None-Match": '"mine"'}) is None


@pytest.mark.parametrize(
    "unfit",
    [
        HttpResponse(200, {}, b"x"),
        HttpResponse(404, {"etag": '"1"'}, b"x"),
        kept_answer('"1"', **{"cache-control": "no-store"}),
        kept_answer('"1"', b"x" * (1024 * 1024 + 1)),
    ],
)
def test_what_may_not_be_kept_is_not_and_what_was_is_dropped(unfit: HttpResponse) -> None:
    kept = ETagCache()
    kept.store(b"k", None, kept_answer('"0"'))
    kept.store(b"k", None, unfit)
    assert kept.add_validator(b"k", {}) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=60))
def test_bytes_and_entries_are_bounded(puts: list[tuple[int, int]]) -> None:
    kept = ETagCache(entries=4, size=100)
    sizes: dict[int, int] = {}
    for name, size in puts:
        kept.store(str(name).encode(), None, kept_answer('"t"', b"x" * size))
        sizes.pop(name, None)
        sizes[name] = size
        held = [other for other in sizes if kept.add_validator(str(other).encode(), {}) is not None]
        assert len(held) <= 4
        assert sum(sizes[other] for other in held) <= 100
        # The newest is there whatever went.
        assert name in held
        for other in list(sizes):
            if other not in held:
                del sizes[other]


@pytest.mark.usefixtures("every_wire")
async def test_a_cacheable_answer_travels_once() -> None:
    states = [State(1), State(1), State(2)]
    sent: list[str | None] = []

    async def read(call: IncomingCall, _body: object) -> State:
        sent.append(call.request.headers.get("if-none-match"))
        return states.pop(0)

    operation = Operation("read", "GET", "/read", read, auth="public", response=State, cacheable=True)
    async with served([operation]) as svc:
        first, again, changed = [await svc.caller.send(svc.out(operation, None)) for _ in range(3)]
    assert [first.body, again.body, changed.body] == [b'{"number":1}', b'{"number":1}', b'{"number":2}']
    assert sent == [None, first.headers["etag"], first.headers["etag"]]
    assert changed.headers["etag"] != first.headers["etag"]


@pytest.mark.usefixtures("every_wire")
async def test_a_stock_client_is_told_that_it_has_the_answer() -> None:
    async def read(_call: IncomingCall, _body: object) -> OperationResponse:
        return OperationResponse(State(1), headers={"ETag": '"v1"'})

    operation = Operation("read", "GET", "/read", read, auth="public", response=State, cacheable=True)
    async with served([operation]) as svc, CURRENT.stock() as client:
        first = await client.get(svc.url + "/read")
        again = await client.get(svc.url + "/read", headers={"If-None-Match": first.headers["etag"]})
    assert (first.status_code, first.headers["etag"]) == (200, '"v1"')
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", '"v1"')
    assert again.headers["x-request-id"]
