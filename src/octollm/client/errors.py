"""The errors of the client as types; each says whether the same call may succeed later."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec

from octollm.contracts.api import TaskView
from octollm.contracts.problems import ERROR_KINDS, Problem
from octollm.errors import FieldError, OctoError
from octollm.rpc.http_client import HttpResponse, TransportError


class APIError(OctoError):
    """A request that failed.

    ``code`` is one of ``docs/errors.md``, ``status`` its HTTP status, ``field_errors`` point into the request body,
    ``retry_after`` is in seconds, and ``request_id`` identifies the request in the services' logs. ``request_sent`` is
    false only when the request surely never reached a handler.
    """

    _is_retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int | None = None,
        field_errors: Sequence[FieldError] = (),
        retry_after: float | None = None,
        request_id: str = "",
        request_sent: bool = True,
    ) -> None:
        super().__init__(detail, code=code, field_errors=field_errors, retry_after=retry_after)
        self.status = ERROR_KINDS[code].status if status is None else status
        self.request_id = request_id
        self.request_sent = request_sent

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later; it depends on the type alone."""
        return self._is_retryable


class InvalidRequest(APIError):
    """The request itself is wrong; ``field_errors`` say where (JSON Pointers, RFC 6901)."""


@contextmanager
def map_encoding_errors() -> Generator[None]:
    """Raise :class:`InvalidRequest` for a ``str`` that UTF-8 cannot encode.

    Such strings have lone surrogates: Python makes them of arguments and file names whose bytes are not UTF-8.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        text = ascii(str(error.object)[max(0, error.start - 20) : error.start + 20])
        raise InvalidRequest(f"A text is not UTF-8: {text}.", code="invalid_body") from error


class AuthenticationError(APIError):
    """The API key is missing, wrong or revoked."""


class PermissionDenied(APIError):
    """The API key does not have the scope for this."""


class NotFound(APIError):
    """The task, file or key does not exist, or belongs to another tenant."""


class Conflict(APIError):
    """The state of the resource does not allow this, for instance cancelling a task that has ended."""


class DeadlineExceeded(APIError):
    """The timeout of the call expired. The request may still take effect."""


class ServerError(APIError):
    """The installation cannot do this; a retry would not help."""


class RateLimited(APIError):
    """Too many requests. The client has waited and retried within its timeout; ``retry_after`` is in seconds."""

    _is_retryable = True


class Unavailable(APIError):
    """No gateway answers, or a service behind it is down; the same call may succeed later."""

    _is_retryable = True


class TaskFailed(OctoError):
    """A task failed: ``code`` and ``reasons`` say why; ``task`` is its final state."""

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
    """A task was cancelled; ``task`` is its final state."""

    code = "cancelled"

    def __init__(self, task: TaskView) -> None:
        super().__init__(f"{task.task_id} was cancelled.")
        self.task = task


class OutputInvalid(OctoError):
    """A completed task's output does not fit the type given to ``submit``.

    ``field_errors`` point into the output (JSON Pointers, RFC 6901); ``task`` is the completed task, with the output as
    text.
    """

    code = "output_invalid"

    def __init__(self, task: TaskView, output: type[Any], field_errors: Sequence[FieldError]) -> None:
        name = getattr(output, "__name__", str(output))
        first = field_errors[0]
        super().__init__(
            f"The output of {task.task_id} is no {name}: {first.pointer or 'the document'}: {first.detail}",
            field_errors=field_errors,
        )
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
    """Return the error type for a status; ``retryable`` is the server's statement.

    Unlisted statuses below 500 are the request's fault, the others the installation's.
    """
    if retryable:
        return RateLimited if status == 429 else Unavailable
    return _BY_STATUS.get(status, InvalidRequest if status < 500 else ServerError)


def error_from_code(code: str, detail: str, *, retry_after: float | None = None) -> APIError:
    """Return the error for a code without a response, as when a WebSocket is closed."""
    kind = ERROR_KINDS[code]
    return error_type_for(kind.status, retryable=kind.retryable)(detail, code=code, retry_after=retry_after)


def error_from_response(response: HttpResponse) -> APIError:
    """Return the error for a response of status 400 or more, whether or not it is a problem document (RFC 9457)."""
    text = response.headers.get("retry-after", "")
    after = float(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
    try:
        problem = msgspec.json.decode(response.body, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # A proxy before the gateway, or another program, sent it.
        return error_type_for(response.status, retryable=response.status in (429, 502, 503, 504))(
            f"The server answered {response.status} without a reason. Is another program or a proxy at that address?",
            code="peer_protocol",
            status=response.status,
            retry_after=after,
        )
    return error_type_for(response.status, retryable=problem.retryable)(
        problem.detail or problem.title,
        code=problem.code,
        status=response.status,
        field_errors=[FieldError(fault.pointer, fault.detail) for fault in problem.errors],
        retry_after=after,
        request_id=problem.request_id,
    )


def error_from_transport(error: TransportError, url: str) -> Unavailable:
    """Return the error for a connection to ``url`` that failed or broke."""
    if error.request_sent:
        return Unavailable(f"{error.detail} See whether it still runs: {url}/ready", code=error.code)
    return Unavailable(
        f"No OctoLLM answers at {url}. Start one with `octollm up` in another terminal, or set OCTOLLM_URL to where one"
        " runs.",
        code=error.code,
        request_sent=False,
    )
