"""Problem documents (RFC 9457) on the wire.

An error becomes a response; a peer's problem becomes a :class:`RemoteError`.
"""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from octollm.contracts.problems import Problem, to_openai_problem, to_problem
from octollm.errors import FieldError, OctoError, RemoteError

PROBLEM_JSON = "application/problem+json"


def problem_response(error: OctoError, request_id: str, *, openai: bool = False) -> Response:
    """Return ``error`` as a response, with ``Retry-After`` or ``WWW-Authenticate`` where they belong.

    ``openai`` adds the member ``error`` of OpenAI's protocol.
    """
    problem = to_openai_problem(error, request_id) if openai else to_problem(error, request_id)
    headers: dict[str, str] = {"Cache-Control": "no-store"}
    if problem.status in (429, 503) and problem.retryable:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 1)))
    if problem.status == 401:
        # RFC 6750 section 3: a 401 names the authentication scheme.
        headers["WWW-Authenticate"] = f'Bearer error="{problem.code}"'
    return Response(msgspec.json.encode(problem), status_code=problem.status, headers=headers, media_type=PROBLEM_JSON)


def remote_error(problem: Problem, service: str, retry_after: float | None = None) -> RemoteError:
    """Return a peer's problem as an exception with the peer's detail, code and status."""
    # The document is more exact than the header, which has whole seconds.
    if isinstance(problem.retry_after, float):
        retry_after = problem.retry_after
    return RemoteError(
        problem.detail or problem.title,
        code=problem.code,
        status=problem.status,
        retryable=problem.retryable,
        field_errors=tuple(FieldError(fault.pointer, fault.detail) for fault in problem.errors),
        retry_after=retry_after,
        service=service,
    )


def parse_problem(service: str, status: int, body: bytes, retry_after: str | None) -> RemoteError:
    """Read a peer's response of status 400 or more, whether or not it is a problem document."""
    after = float(retry_after) if retry_after and retry_after.isdigit() else None
    try:
        return remote_error(msgspec.json.decode(body, type=Problem), service, after)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return RemoteError(
            f"{service} answered {status} without a problem document.",
            code="peer_protocol",
            status=status,
            retryable=status in (429, 502, 503, 504),
            retry_after=after,
            service=service,
        )
