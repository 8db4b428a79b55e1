"""The errors of the client as types; each says whether the same call may succeed later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from octollm.contracts.api import TaskView
from octollm.contracts.problems import ERROR_KINDS, Problem
from octollm.errors import FieldError, OctoError
from octollm.rpc.http_client import HttpResponse, TransportError


class APIError(OctoError):
    """A request that the door did not grant.

    ``code`` is one of ``docs/errors.md``, ``status`` the HTTP status that belongs to it, ``faults`` point into the
    body, ``retry_after`` is in seconds, and ``request_id`` finds the request in the services' logs. ``began`` is
    false when the request surely never reached a handler.
    """

    retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int | None = None,
        faults: Sequence[FieldError] = (),
        retry_after: float | None = None,
        request_id: str = "",
        request_sent: bool = True,
    ) -> None:
        super().__init__(detail, code=code, field_errors=faults, retry_after=retry_after)
        self.status = ERROR_KINDS[code].status if status is None else status
        self.request_id = request_id
        self.request_sent = request_sent


class InvalidRequest(APIError):
    """The request itself is wrong; ``faults`` say where (JSON Pointers, RFC 6901)."""


class AuthenticationError(APIError):
    """The door does not know who asks: there is no API key, or it is wrong or revoked."""


class PermissionDenied(APIError):
    """Who asks is known, and may not do this."""


class NotFound(APIError):
    """There is no such task, file or key, or it is another tenant's."""


class Conflict(APIError):
    """The state of things does not allow this, for instance cancelling a task that has ended."""


class DeadlineExceeded(APIError):
    """The time for this call was used up. What was asked for may still happen."""


class ServerError(APIError):
    """The installation cannot do this, and asking again would not help."""


class RateLimited(APIError):
    """Too many requests; ``retry_after`` says when to go on. It was waited for as long as the timeout allowed."""

    retryable = True


class Unavailable(APIError):
    """No door could be reached, or something behind it is away; the same call may succeed later."""

    retryable = True


class TaskFailed(OctoError):
    """A task that ended without a result: ``code`` and ``reasons`` say why, ``task`` is all there is to know of it."""

    def __init__(self, task: TaskView) -> None:
        error = task.error
        super().__init__(
            error.detail if error else "The task failed without saying why.",
            code=error.code if error else "internal",
            field_errors=[FieldError(fault.pointer, fault.detail) for fault in error.errors] if error else (),
        )
        self.reasons = error.reasons if error else ()
        self.task = task


class TaskCancelled(OctoError):
    """A task that was cancelled; ``task`` is all there is to know of it."""

    code = "cancelled"

    def __init__(self, task: TaskView) -> None:
        super().__init__(f"{task.task_id} was cancelled.")
        self.task = task


_BY_STATUS: dict[int, type[APIError]] = {
    401: AuthenticationError,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
    504: DeadlineExceeded,
}


def error_type_for(status: int, *, retryable: bool) -> type[APIError]:
    """Return the type of a refusal with this status; ``retryable`` is the door's own word on it.

    Statuses that are not named are the request's fault below 500, and the installation's from there.
    """
    if retryable:
        return RateLimited if status == 429 else Unavailable
    return _BY_STATUS.get(status, InvalidRequest if status < 500 else ServerError)


def error_from_code(code: str, detail: str, *, retry_after: float | None = None) -> APIError:
    """Return a failure that is known by its ``code`` alone, as when a WebSocket is closed."""
    kind = ERROR_KINDS[code]
    return error_type_for(kind.status, retryable=kind.retryable)(detail, code=code, retry_after=retry_after)


def error_from_response(response: HttpResponse) -> APIError:
    """Return the failure that an answer of status 400 or more tells, also one that is no problem document."""
    text = response.headers.get("retry-after", "")
    after = float(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
    try:
        problem = msgspec.json.decode(response.body, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Something that stands before the door, or another program.
        return error_type_for(response.status, retryable=response.status in (429, 502, 503, 504))(
            f"The door answered {response.status} without saying why. Is another program or a proxy at that address?",
            code="peer_protocol",
            status=response.status,
            retry_after=after,
        )
    return error_type_for(response.status, retryable=problem.retryable)(
        problem.detail or problem.title,
        code=problem.code,
        status=response.status,
        faults=[FieldError(fault.pointer, fault.detail) for fault in problem.errors],
        retry_after=after,
        request_id=problem.request_id,
    )


def error_from_transport(error: TransportError, url: str) -> Unavailable:
    """Return what to say when ``url`` gave no whole answer."""
    if error.request_sent:
        return Unavailable(f"{error.detail} See whether it still runs: {url}/ready", code=error.code)
    return Unavailable(
        f"No OctoLLM answers at {url}. Start one with `octollm up` in another terminal, or set OCTOLLM_URL to where one"
        " runs.",
        code=error.code,
        request_sent=False,
    )
