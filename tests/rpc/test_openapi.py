from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import served
from msgspec import UNSET, Meta, Struct, UnsetType
from wires import CURRENT

from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.rpc.codec import decode, decode_query
from octollm.rpc.openapi import REQUEST_EXAMPLES, build_openapi, render_docs_page


class Body(Struct):
    number: Annotated[int, Meta(ge=1)] = 1


class Answer(Struct):
    text: str


class Query(Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: str = ""
    state: UnsetType | str = UNSET


async def nothing(_call: IncomingCall, _body: object) -> Answer:
    return Answer("<script>alert(1)</script>")


def operation(**options: Any) -> Operation:
    return Operation(**{"name": "svc.op", "method": "POST", "path": "/op/{name}", "handler": nothing, **options})


def described(**options: Any) -> dict[str, Any]:
    api = build_openapi("svc", [operation(**options)])
    return api["paths"]["/op/{name}"][options.get("method", "POST").lower()]


def names(op: dict[str, Any], where: str) -> set[str]:
    return {parameter["name"] for parameter in op["parameters"] if parameter["in"] == where}


def test_what_a_call_may_carry_and_what_comes_back() -> None:
    op = described(
        kind="at_most_once",
        body=Body,
        response=Answer,
        status=201,
        docs=OperationDocs(error_codes=("not_found",)),
    )
    assert names(op, "path") == {"name"}
    assert names(op, "header") == {
        "X-Request-ID",
        "X-Correlation-ID",
        "traceparent",
        "X-Timeout-Ms",
        "Idempotency-Key",
    }
    assert set(op["responses"]["201"]["content"]) == {"application/json", "application/x-ndjson"}
    assert set(op["responses"]["201"]["headers"]) >= {"Location", "X-Request-ID", "Idempotent-Replayed"}
    assert set(op["responses"]["409"]["content"]["application/problem+json"]["examples"]) == {
        "idempotency_conflict",
        "outcome_unknown",
    }
    assert "not_found" in op["responses"]["404"]["content"]["application/problem+json"]["examples"]
    assert "Retry-After" in op["responses"]["503"]["headers"]
    assert "WWW-Authenticate" in op["responses"]["401"]["headers"]
    assert "default" in op["responses"]


def test_a_safe_one_is_not_described_with_what_it_does_not_have() -> None:
    op = described(method="GET", auth="public", query=Query, response=Answer, cacheable=True)
    assert op["security"] == [{}]
    assert "401" not in op["responses"]
    assert "409" not in op["responses"]
    assert "413" not in op["responses"]
    assert names(op, "query") == {"limit", "cursor", "state"}
    assert "If-None-Match" in names(op, "header")
    assert "Idempotency-Key" not in names(op, "header")
    assert set(op["responses"]["304"]["headers"]) >= {"ETag", "Cache-Control"}


def test_every_reference_leads_somewhere() -> None:
    api = build_openapi("svc", [operation(body=Body, response=Answer, kind="at_most_once")])
    found = re.findall(r'"\$ref":"#/components/(\w+)/([^"]+)"', msgspec.json.encode(api).decode())
    assert len(found) > 20
    for kind, name in found:
        assert name in api["components"][kind]


def test_examples_are_bodies_that_fit() -> None:
    for kind, example in REQUEST_EXAMPLES.items():
        assert decode(msgspec.json.encode(example), kind, strict=True) == example  # type: ignore[arg-type]


def test_the_page_runs_nothing_and_fetches_nothing() -> None:
    hostile = "<script>alert(1)</script>"
    html, policy = render_docs_page(build_openapi("svc", [operation(summary=hostile, body=Body, response=Answer)]))
    assert hostile not in html
    assert "<script" not in html
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    assert "default-src 'none'" in policy
    assert "curl --request POST $URL/op/{name}" in html


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b"", Query()),
        (b"limit=5", Query(limit=5)),
        (b"limit=5&limit=6", Query(limit=6)),
        (b"cursor=a%2Bb&other=1", Query(cursor="a+b")),
        (b"state=", Query(state="")),
        (b"cursor=null", Query(cursor="null")),
    ],
)
def test_a_query_is_read(text: bytes, wanted: Query) -> None:
    assert decode_query(text, Query) == wanted


@pytest.mark.parametrize(
    ("text", "name"),
    [(b"limit=0", "limit"), (b"limit=201", "limit"), (b"limit=x", "limit"), (b"limit=", "limit"), (b"a=1&" * 101, "")],
)
def test_a_query_that_does_not_fit_is_refused_by_name(text: bytes, name: str) -> None:
    with pytest.raises(OctoError) as caught:
        decode_query(text, Query)
    assert caught.value.code == "invalid_parameter"
    assert name in caught.value.detail


@given(st.binary(max_size=200))
def test_any_query_is_read_or_refused(text: bytes) -> None:
    try:
        found = decode_query(text, Query)
    except OctoError as error:
        assert error.code == "invalid_parameter"
    else:
        assert 1 <= found.limit <= 200


async def test_the_page_and_the_description_are_served() -> None:
    async with served([operation(auth="public", body=Body, response=Answer)]) as svc, CURRENT.stock() as client:
        page = await client.get(svc.url + "/docs")
        again = await client.get(svc.url + "/openapi.json")
        held = await client.get(svc.url + "/openapi.json", headers={"If-None-Match": again.headers["etag"]})
        refused = await client.delete(svc.url + "/op/a")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "OctoLLM svc" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert (again.status_code, held.status_code) == (200, 304)
    # RFC 9110 section 15.5.6
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
