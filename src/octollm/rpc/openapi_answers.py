"""What the description of an operation says of its answers: errors by status, headers, an example of each code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from octollm.contracts.problems import ERROR_KINDS, to_problem
from octollm.errors import FieldError, OctoError
from octollm.rpc.call import Operation
from octollm.rpc.problems import PROBLEM_JSON

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
_REQUEST_CODES = ("request_timeout", "url_too_long", "header_too_large")
_TOKEN_CODES = ("token_missing", "token_malformed", "token_expired", "token_invalid", "token_revoked", "scope_missing")
_GATEWAY_CODES = ("api_key_invalid", "host_refused", "origin_refused", "rate_limited", "connect_failed")


def error_codes(op: Operation) -> list[str]:
    """Return the codes that an operation may answer, by what it takes and how it is opened, and its own."""
    codes = [*_REQUEST_CODES, "invalid_header", "draining", "unavailable", "deadline_exceeded", "internal"]
    if op.limited:
        codes.append("overloaded")
    if op.auth != "public":
        codes += _TOKEN_CODES
    if op.auth == "door":
        codes += _GATEWAY_CODES
    if op.path.count("{") or op.query is not None:
        codes.append("invalid_parameter")
    if op.body is not None:
        codes.append("body_too_large")
        if op.body is not bytes:
            codes += ["invalid_json", "invalid_body"]
            if op.strict or op.auth == "door":
                codes.append("unknown_field")
    if op.kind != "read_only":
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
    if op.kind != "read_only" and status < 300:
        names.append("Idempotent-Replayed")
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _example(code: str) -> object:
    faults = (FieldError("/goal", "Expected `str`, got `int`"),) if code == "invalid_body" else ()
    problem = to_problem(OctoError(f"{ERROR_KINDS[code].title}.", code=code, field_errors=faults), "req-7f3a")
    return msgspec.json.decode(msgspec.json.encode(problem))
