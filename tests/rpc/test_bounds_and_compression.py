"""Answers that are compressed for who asks, requests that are too long or too slow, and readiness with latencies."""

from __future__ import annotations

import asyncio
import gzip
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import IDS, base_for, served
from starlette.responses import Response
from wires import CURRENT

from octollm.contracts.observability import DependencyStatus
from octollm.rpc.call import IncomingCall, Operation, OperationResponse
from octollm.rpc.responses import accepts_gzip, compress
from octollm.rpc.service import build_service
from octollm.rpc.transport import listen

pytestmark = pytest.mark.usefixtures("every_wire")

TEXT = "the same again, " * 200


class Text(msgspec.Struct):
    text: str


async def long(_call: IncomingCall, _body: object) -> OperationResponse:
    return OperationResponse(Text(TEXT), 200, {"ETag": '"1"'})


async def short(_call: IncomingCall, _body: object) -> Text:
    return Text("short")


async def picture(_call: IncomingCall, _body: object) -> Response:
    return Response(b"\x89PNG" + TEXT.encode(), media_type="image/png")


def get(path: str, handler: object) -> Operation:
    return Operation(path[1:], "GET", path, handler, auth="public", max_body=0)  # type: ignore[arg-type]


async def test_answers_from_a_kibibyte_on_are_compressed_for_who_asks() -> None:
    operations = [get("/long", long), get("/short", short), get("/picture", picture)]
    async with served(operations) as svc, CURRENT.stock(base_url=svc.url) as client:
        one = await client.get("/long", headers={"Accept-Encoding": "br;q=1, gzip;q=0.5"})
        assert one.json() == {"text": TEXT}
        assert one.headers["content-encoding"] == "gzip"
        assert int(one.headers["content-length"]) < 200
        assert (one.headers["etag"], one.headers["vary"]) == ('W/"1"', "Accept-Encoding")
        for path, accept in (("/long", "identity"), ("/long", "gzip;q=0"), ("/short", "gzip"), ("/picture", "gzip")):
            plain = await client.get(path, headers={"Accept-Encoding": accept})
            assert "content-encoding" not in plain.headers
            assert int(plain.headers["content-length"]) == len(plain.content)
        assert (await client.get("/long", headers={"Accept-Encoding": "br"})).headers["vary"] == "Accept-Encoding"
        head = await client.head("/long", headers={"Accept-Encoding": "gzip"})
        assert head.headers["content-length"] == one.headers["content-length"]
        async with CURRENT.client() as http:
            inside = await http.send("GET", svc.url + "/long", {}, None, seconds=5)
        assert "content-encoding" not in inside.headers
        assert json.loads(inside.body) == {"text": TEXT}


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (b"gzip", True),
        (b"GZIP ; q=0.001", True),
        (b"*", True),
        (b"*, gzip; q=0.000", False),
        (b"gzip;q=0, *", False),
        (b"", False),
        (b"deflate", False),
        (b"x-gzip", False),
        (b"identity;q=1, *;q=0", False),
    ],
)
def test_what_a_client_accepts(header: bytes, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


@given(st.binary(max_size=60))
def test_any_header_is_read(header: bytes) -> None:
    assert accepts_gzip(header) in (True, False)


async def test_a_large_answer_is_compressed_as_well() -> None:
    body = TEXT.encode() * 500
    small, headers = await compress(body, [(b"content-type", b"text/plain"), (b"content-length", b"9")], b"gzip")
    assert gzip.decompress(small) == body
    assert dict(headers)[b"content-length"] == str(len(small)).encode()


async def test_readiness_names_each_dependency_and_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octollm.rpc.health.READINESS_CHECK_SECONDS", 0.2)

    async def healthy() -> DependencyStatus:
        return DependencyStatus(ok=True)

    async def hang() -> DependencyStatus:
        await asyncio.Event().wait()
        raise AssertionError

    bound = listen("127.0.0.1", 0, "svc")
    url = CURRENT.url(bound.getsockname()[1])
    async with CURRENT.client() as http:
        service = build_service(
            base_for(http, {"svc": (url,)}), [], readiness_checks={"database": healthy, "redis": hang}
        )
        async with service.serve(bound), CURRENT.stock(base_url=url) as client:
            answer = await client.get("/ready", headers={"X-Request-ID": IDS.hex()})
    assert answer.status_code == 503
    found = answer.json()["dependencies"]
    assert found["database"]["ok"]
    assert found["database"]["latency_ms"] >= 0
    assert (found["redis"]["ok"], found["redis"]["detail"]) == (False, "There was no answer in 0.2 s.")
    assert found["redis"]["latency_ms"] >= 200
