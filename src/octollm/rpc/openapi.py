"""An OpenAPI 3.1 description made from the operations' types."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from octollm import __version__
from octollm.contracts.examples import REQUEST_EXAMPLES
from octollm.contracts.problems import Problem
from octollm.contracts.stream import NDJSON
from octollm.rpc.call import JSON, Operation
from octollm.rpc.openapi_answers import (
    RESPONSE_HEADERS,
    error_codes,
    problem_examples,
    problem_responses,
    response_headers,
)
from octollm.rpc.shapes import encode, json_schemas

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "capability": [{"bearer": []}],
    "service": [{"service": []}],
    "door": [{"bearer": []}, {}],
    "public": [{}],
}
_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT chain",
        "description": "A capability, or an API key at the public door.",
    },
    "service": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "svc+jwt",
        "description": "What a service of the installation signs for itself.",
    },
}
_ID_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-ID": ("This call; the same when it is tried again. Made up where it is missing.", {"type": "string"}),
    "X-Correlation-ID": ("What the call belongs to. Made up where it is missing.", {"type": "string"}),
    "traceparent": ("Where the call is in its trace (W3C Trace Context).", {"type": "string"}),
    "X-Timeout-Ms": ("The time that is left for the call, in milliseconds.", {"type": "integer", "minimum": 1}),
}
_OCTETS = "application/octet-stream"
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_IDEMPOTENCY_KEY_DOCS = "What makes a repeat of this call harmless: the same call with the same key takes effect once."
_NDJSON_DOCS = (
    "A line of JSON for each of `progress`, `token` and `heartbeat` while the work goes on, then one whose `type` is"
    " `result`, with the answer as `result`, or `problem`."
)
_IF_NONE_MATCH_DOCS = "The ETag of an answer that the caller has: where it still holds, the answer is 304."


class _Schemas:
    """The schemas of all types that operations name."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        named = [kind for op in operations for kind in (op.body, op.response, op.query) if kind not in (None, bytes)]
        kinds = [*named, Problem]
        schemas, self.components = json_schemas(kinds)
        self._by_kind = dict(zip(map(repr, kinds), schemas, strict=True))

    def of(self, kind: object) -> dict[str, Any]:
        return self._by_kind[repr(kind)]

    def members(self, kind: object) -> Iterable[tuple[str, dict[str, Any], bool]]:
        """Yield name, schema and whether it is needed of each member of a Struct."""
        schema = self.of(kind)
        schema = self.components[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        for name, member in schema.get("properties", {}).items():
            yield name, member, name in schema.get("required", ())


def build_openapi(service: str, operations: Sequence[Operation]) -> dict[str, Any]:
    """Describe a service. Bodies and answers without a type are described as any content."""
    schemas = _Schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    codes: set[str] = set()
    for op in operations:
        described = _operation_object(op, schemas)
        codes.update(error_codes(op))
        paths.setdefault(_PARAMETER.sub(r"{\1}", op.path), {})[op.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"OctoLLM {service}",
            "version": __version__,
            "description": "Errors are problem documents (RFC 9457), told apart by `code`.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "headers": RESPONSE_HEADERS,
            "examples": problem_examples(sorted(codes)),
            "securitySchemes": _SCHEMES,
        },
    }


def _operation_object(op: Operation, schemas: _Schemas) -> dict[str, Any]:
    responses: dict[str, Any] = {
        str(status): _response_object(op, status, schemas) for status in (op.status, *op.docs.other_statuses)
    }
    if op.cacheable:
        responses["304"] = {"description": "The caller has it already.", "headers": response_headers(op, 304)}
    for status, response in problem_responses(op, schemas.of(Problem)).items():
        known = responses.setdefault(status, response)
        known["content"] = {**response["content"], **known.get("content", {})}
    described: dict[str, Any] = {
        "operationId": f"{op.name}_{op.method.lower()}".replace(".", "_"),
        "summary": op.summary,
        "tags": [_tag(op)],
        "security": _SECURITY[op.auth],
        "parameters": _parameters(op, schemas),
        "responses": responses,
    }
    if op.scope and op.auth == "capability":
        described["x-scope"] = op.scope
    if op.body is not None:
        described["requestBody"] = {"required": True, "content": _body_content(op, schemas)}
    return described


def _tag(op: Operation) -> str:
    family, dot, _ = op.name.partition(".")
    return family if dot else "itself" if op.auth == "public" else "operations"


def _parameters(op: Operation, schemas: _Schemas) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(op.path)
    ]
    if op.query is not None:
        found += [
            {"name": name, "in": "query", "required": required, "schema": schema}
            for name, schema, required in schemas.members(op.query)
        ]
    headers = {name: {"description": text, "schema": schema} for name, (text, schema) in _ID_HEADERS.items()}
    headers |= {name: {"description": text, "schema": {"type": "string"}} for name, text in op.docs.headers.items()}
    if op.cacheable:
        headers["If-None-Match"] = {"description": _IF_NONE_MATCH_DOCS, "schema": {"type": "string"}}
    if op.kind != "read_only":
        key = {"type": "string", "minLength": 1, "maxLength": 200}
        headers["Idempotency-Key"] = {"description": _IDEMPOTENCY_KEY_DOCS, "schema": key}
    return [*found, *({"name": name, "in": "header", "required": False, **rest} for name, rest in headers.items())]


def _body_content(op: Operation, schemas: _Schemas) -> dict[str, Any]:
    if op.body is bytes:
        return {_OCTETS: _BYTES}
    described: dict[str, Any] = {"schema": schemas.of(op.body)}
    example = op.docs.example if op.docs.example is not None else REQUEST_EXAMPLES.get(op.body)
    if example is not None:
        described["example"] = msgspec.json.decode(encode(example))
    return {JSON: described}


def _response_object(op: Operation, status: int, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {"description": "The answer.", "headers": response_headers(op, status)}
    if status == 204 or (op.response is None and op.docs.media_type == JSON):
        return described
    content: dict[str, Any] = {op.docs.media_type: {} if op.response is None else {"schema": schemas.of(op.response)}}
    if op.docs.media_type == "*/*":
        content[_OCTETS] = _BYTES
    if op.docs.stream_media_type:
        content[op.docs.stream_media_type] = {}
    if op.streams:
        content[NDJSON] = {"schema": {"type": "string", "description": _NDJSON_DOCS}}
    described["content"] = content
    return described
