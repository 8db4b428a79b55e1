"""The OpenAPI 3.1 description of a service, made from the types of its operations.

It has error responses and examples, and is served as one static HTML page at ``/docs`` too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import msgspec

from octollm import __version__
from octollm.contracts.auth import KeyRequest, TokenRequest
from octollm.contracts.enrolment import EnrolmentTokenRequest
from octollm.contracts.operations import (
    AcceptRequest,
    DocumentIn,
    RunRequest,
    SearchRequest,
    ValidateRequest,
)
from octollm.contracts.problems import ERROR_KINDS, Problem, to_problem
from octollm.contracts.stream import NDJSON
from octollm.contracts.task import ArmInfo, Budget, ExecuteResult, FileRef, PlanRequest, Task, TaskContext
from octollm.errors import FieldError, OctoError
from octollm.rpc.call import JSON, Operation
from octollm.rpc.codec import encode, json_schemas
from octollm.rpc.problems import PROBLEM_JSON

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_ID_SEPARATORS = str.maketrans(".:", "__")
_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "capability": [{"bearer": []}],
    "service": [{"service": []}],
    "gateway": [{"bearer": []}, {}],
    "public": [{}],
}
_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT chain",
        "description": "A capability, or an API key at the gateway.",
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
        "operationId": f"{op.name}_{op.method.lower()}".translate(_ID_SEPARATORS),
        "summary": op.summary,
        "tags": [_tag(op)],
        "security": _SECURITY[op.auth],
        "parameters": _parameters(op, schemas),
        "responses": responses,
    }
    if op.scope and op.auth in ("capability", "gateway"):
        described["x-scope"] = op.scope
    if op.body is not None:
        described["requestBody"] = {"required": True, "content": _body_content(op, schemas)}
    return described


def _tag(op: Operation) -> str:
    family, separator, _ = op.name.replace(":", ".").partition(".")
    return family if separator else "itself" if op.auth == "public" else "operations"


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
    if op.takes_key:
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


_EXAMPLE_CODE = "def add(a, b):\n    return a + b\n"
_EXAMPLE_NOTES = "The office closes at six.\nIt opens at nine.\n"

# Examples are values of the contract's own types, so that a change of a type cannot leave one behind.
_EXAMPLES = (
    Task(
        "Write a Python function that adds two numbers, with tests",
        acceptance_criteria=("The tests pass.",),
        budget=Budget(max_tokens=20_000, max_time_seconds=300.0),
    ),
    PlanRequest(
        "When does the office close?",
        context=TaskContext(files=(FileRef("notes.txt", text=_EXAMPLE_NOTES),)),
        arms=(ArmInfo("retriever", "Answers questions from the task's files.", ("files:text",)),),
    ),
    RunRequest("python", ("main.py",), (FileRef("main.py", text="print(1 + 1)\n"),)),
    ValidateRequest(_EXAMPLE_CODE, tests="from solution import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"),
    AcceptRequest("When does the office close?", ExecuteResult("At six."), ("The answer names a time.",)),
    SearchRequest("When does the office close?"),
    DocumentIn("notes.txt", _EXAMPLE_NOTES, hashlib.sha256(_EXAMPLE_NOTES.encode()).hexdigest()),
    KeyRequest("laptop", "user"),
    TokenRequest("judge:validate", "judge"),
    EnrolmentTokenRequest("translator", ("models:chat",)),
)

REQUEST_EXAMPLES: dict[object, object] = {type(example): example for example in _EXAMPLES}
"""By the type of the body."""


_TEXT = {"type": "string"}
RESPONSE_HEADERS: dict[str, Any] = {
    "X-Request-ID": {"description": "This call.", "schema": _TEXT},
    "X-Correlation-ID": {"description": "What the call belongs to.", "schema": _TEXT},
    "Retry-After": {"description": "Seconds to wait before the next try.", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "The scheme that opens it (RFC 6750).", "schema": _TEXT},
    "Location": {"description": "Where what was made is.", "schema": _TEXT},
    "ETag": {"description": "What this answer is known by.", "schema": _TEXT},
    "Cache-Control": {"description": "Who may keep the answer, and how long.", "schema": _TEXT},
    "Idempotent-Replayed": {"description": "`true` on the stored answer of an earlier call.", "schema": _TEXT},
}
_REQUEST_CODES = ("malformed_request", "request_timeout", "url_too_long", "header_too_large")
_TOKEN_CODES = ("token_missing", "token_malformed", "token_expired", "token_invalid", "token_revoked", "scope_missing")
_GATEWAY_CODES = ("api_key_invalid", "host_refused", "origin_refused", "rate_limited", "connect_failed")


def error_codes(op: Operation) -> list[str]:
    """Return the codes that an operation may answer, by what it takes and how it is opened, and its own."""
    codes = [*_REQUEST_CODES, "invalid_header", "draining", "unavailable", "deadline_exceeded", "internal"]
    if op.limited:
        codes.append("overloaded")
    if op.auth != "public":
        codes += _TOKEN_CODES
    if op.auth == "gateway":
        codes += _GATEWAY_CODES
    if op.path.count("{") or op.query is not None:
        codes.append("invalid_parameter")
    if op.body is not None:
        codes.append("body_too_large")
        if op.body is not bytes:
            codes += ["invalid_json", "invalid_body"]
            if op.strict or op.auth == "gateway":
                codes.append("unknown_field")
    if op.takes_key:
        codes += ["idempotency_conflict", "outcome_unknown"]
    return sorted({*codes, *op.docs.error_codes})


def problem_responses(op: Operation, schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the answers of an operation that are problems, by status; ``default`` is any other."""
    by_status: dict[int, list[str]] = {}
    for code in error_codes(op):
        by_status.setdefault(ERROR_KINDS[code].status, []).append(code)
    found: dict[str, dict[str, Any]] = {}
    for status, codes in sorted(by_status.items()):
        examples = {code: {"$ref": f"#/components/examples/{code}"} for code in codes}
        found[str(status)] = {
            "description": "; ".join(f"`{code}`: {ERROR_KINDS[code].title}" for code in codes) + ".",
            "headers": response_headers(op, status),
            "content": {PROBLEM_JSON: {"schema": schema, "examples": examples}},
        }
    found["default"] = {
        "description": "A problem document (RFC 9457).",
        "content": {PROBLEM_JSON: {"schema": schema}},
    }
    return found


def problem_examples(codes: Iterable[str]) -> dict[str, Any]:
    """Return an example of each code's problem."""
    return {code: {"summary": ERROR_KINDS[code].title, "value": _example(code)} for code in codes}


def response_headers(op: Operation, status: int) -> dict[str, Any]:
    """Return the headers that come with a status."""
    names = ["X-Request-ID", "X-Correlation-ID"]
    if status == 401:
        names.append("WWW-Authenticate")
    if status in (429, 503):
        names.append("Retry-After")
    if status == 201:
        names.append("Location")
    if op.cacheable and status in (200, 304):
        names += ["ETag", "Cache-Control"]
    if op.takes_key and status < 300:
        names.append("Idempotent-Replayed")
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _example(code: str) -> object:
    faults = (FieldError("/goal", "Expected `str`, got `int`"),) if code == "invalid_body" else ()
    problem = to_problem(OctoError(f"{ERROR_KINDS[code].title}.", code=code, field_errors=faults), "req-7f3a")
    return msgspec.json.decode(msgspec.json.encode(problem))


_STYLE = """
:root { color-scheme: light dark; --bg: #f5f5f8; --card: #fff; --line: #e2e2ea; --text: #1b1b25; --soft: #5d5d70;
  --accent: #5b3fd6; --code: #f3f3f8; --get: #11734a; --post: #5b3fd6; --put: #8a5300; --delete: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bg: #111118; --card: #1a1a24; --line: #2e2e3d; --text: #ececf4;
  --soft: #a9a9bd; --accent: #a793ff; --code: #15151e; --get: #6fd6a4; --post: #a793ff; --put: #f2bd6a;
  --delete: #ff9d93; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.55 system-ui, sans-serif; }
main, header { max-width: 980px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 34px; } main { padding-bottom: 64px; }
h1 { margin: 0; font-size: 1.6rem; letter-spacing: -.02em; } h2 { margin: 30px 0 8px; font-size: 1.05rem; }
h3 { margin: 18px 0 6px; font-size: .9rem; } p { margin: 4px 0; }
.soft { color: var(--soft); } a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 14px 0; }
details.op { margin: 6px 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
details.op > summary { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline; padding: 9px 14px;
  cursor: pointer; list-style: none; } details.op > summary::-webkit-details-marker { display: none; }
details.op[open] > summary { border-bottom: 1px solid var(--line); } details.op > div { padding: 4px 16px 16px; }
.method { flex: none; width: 4.2em; font: 700 .78rem ui-monospace, monospace; } .get { color: var(--get); }
.post { color: var(--post); } .put, .patch { color: var(--put); } .delete { color: var(--delete); }
code, pre { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 6px 0; padding: 10px 12px; overflow-x: auto; background: var(--code); border-radius: 8px; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; } td { padding: 5px 12px 5px 0; vertical-align: top;
  border-top: 1px solid var(--line); } td:first-child { white-space: nowrap; width: 1%; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 6px; }
"""
_MAX_OUTLINE_DEPTH = 6


def render_docs_page(api: dict[str, Any]) -> tuple[str, str]:
    """Return the page of a description, and the Content-Security-Policy that it goes with."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    # The page needs no script, and its one style is allowed by its hash.
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return "".join(_page_html(api)), f"{policy}; frame-ancestors 'none'"


def _page_html(api: dict[str, Any]) -> Iterator[str]:
    info = api["info"]
    title = escape(info["title"])
    by_tag: dict[str, list[str]] = {}
    for path, methods in api["paths"].items():
        for method, op in methods.items():
            by_tag.setdefault(op["tags"][0], []).append("".join(_operation_html(path, method, op, api)))
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><header><h1>{title}</h1>'
    yield f'<p class="soft">Version {escape(info["version"])}. {_text_html(info["description"])}</p>'
    yield '<p>The same for programs: <a href="openapi.json">openapi.json</a> (OpenAPI 3.1).</p><nav>'
    for tag in by_tag:
        yield f'<a href="#{escape(tag)}">{escape(tag)}</a>'
    yield "</nav></header><main>"
    for tag, operations in by_tag.items():
        yield f'<h2 id="{escape(tag)}">{escape(tag)}</h2>'
        yield from operations
    yield "</main></body></html>"


def _operation_html(path: str, method: str, op: dict[str, Any], api: dict[str, Any]) -> Iterator[str]:
    yield f'<details class="op" id="{escape(op["operationId"])}"><summary>'
    yield f'<span class="method {method}">{method.upper()}</span><code>{escape(path)}</code>'
    yield f'<span class="soft">{escape(op["summary"])}</span></summary><div>'
    opened = "anybody" if op["security"] == [{}] else "a bearer token"
    scope = f", with the scope <code>{escape(op['x-scope'])}</code>" if "x-scope" in op else ""
    yield f"<p>Opened by {opened}{scope}.</p><h3>Call</h3><pre>{escape(_curl(path, method, op))}</pre>"
    yield from _table_html("Parameters", (_parameter_html(one) for one in op["parameters"]))
    for kind, content in op.get("requestBody", {}).get("content", {}).items():
        yield f"<h3>Body <code>{escape(kind)}</code></h3>{_schema_html(content.get('schema', {}), api)}"
    for status, response in op["responses"].items():
        for kind, content in response.get("content", {}).items():
            schema = content.get("schema")
            if status.startswith("2") and "problem" not in kind and schema:
                told = (
                    f"<p>{_text_html(schema['description'])}</p>"
                    if "description" in schema
                    else _schema_html(schema, api)
                )
                yield f"<h3>{status} <code>{escape(kind)}</code></h3>{told}"
    yield from _table_html(
        "Statuses", ((status, _text_html(one["description"])) for status, one in op["responses"].items())
    )
    yield "</div></details>"


def _table_html(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"<h3>{title}</h3><table>"
    for name, text in rows:
        yield f"<tr><td><code>{escape(name)}</code></td><td>{text}</td></tr>"
    yield "</table>"


def _parameter_html(parameter: dict[str, Any]) -> tuple[str, str]:
    needed = "needed" if parameter["required"] else "optional"
    text = (
        f'<span class="soft">{escape(parameter["in"])}, {needed}</span> {_text_html(parameter.get("description", ""))}'
    )
    bounds = {name: value for name, value in parameter["schema"].items() if name not in ("type", "title")}
    return parameter["name"], text + (f" <code>{escape(json.dumps(bounds))}</code>" if bounds else "")


def _curl(path: str, method: str, op: dict[str, Any]) -> str:
    lines = [f"curl --request {method.upper()} $URL{path}"]
    if op["security"] != [{}]:
        lines.append('--header "Authorization: Bearer $TOKEN"')
    for kind, content in op.get("requestBody", {}).get("content", {}).items():
        lines.append(f'--header "Content-Type: {kind}"')
        if "example" in content:
            body = json.dumps(content["example"], indent=2).replace("'", "'\\''")
            lines.append(f"--data '{body}'")
        else:
            lines.append("--data-binary @FILE")
    return " \\\n  ".join(lines)


def _schema_html(schema: dict[str, Any], api: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(_outline(schema, api, 0), indent=2, ensure_ascii=False))}</pre>"


def _outline(schema: dict[str, Any], api: dict[str, Any], depth: int) -> object:
    """Return a schema as a picture of its value: members by name, each with the word for what it is."""
    if "$ref" in schema:
        name: str = schema["$ref"].rpartition("/")[2]
        found = api["components"]["schemas"].get(name, {})
        return name if depth >= _MAX_OUTLINE_DEPTH else _outline(found, api, depth + 1)
    if "properties" in schema:
        needed = schema.get("required", ())
        return {
            name + ("" if name in needed else "?"): _outline(member, api, depth + 1)
            for name, member in schema["properties"].items()
        }
    if "anyOf" in schema:
        kinds = [_outline(kind, api, depth + 1) for kind in schema["anyOf"]]
        words = [kind for kind in kinds if isinstance(kind, str)]
        return " | ".join(words) if len(words) == len(kinds) else next(k for k in kinds if not isinstance(k, str))
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return [_outline(schema["items"], api, depth + 1)]
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    return str(schema.get("type", "any"))


def _text_html(text: str) -> str:
    """Return a text with what stands between backquotes as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
