"""Every stable error code: its HTTP status, title and whether repeating the same call can help.

A code is never renamed or reused. ``docs/errors.md`` has a heading for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from octollm.errors import FieldError, OctoError, RemoteError


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What a code means on the wire.

    ``retryable``: the same request again can help. ``new_attempt``: where it cannot, another attempt of the step can;
    that has idempotency keys and tokens of its own, and the reasons of the failure are in its prompt.
    """

    status: int
    title: str
    retryable: bool = False
    new_attempt: bool = False


ERROR_KINDS: dict[str, ErrorKind] = {
    # The request itself
    "malformed_request": ErrorKind(400, "The request is not valid HTTP/1.1"),
    "invalid_json": ErrorKind(400, "The body is not valid JSON"),
    "invalid_body": ErrorKind(400, "The body does not match its schema", new_attempt=True),
    "unknown_field": ErrorKind(400, "The body has an unknown member"),
    "invalid_parameter": ErrorKind(400, "A query or path parameter is invalid"),
    "invalid_header": ErrorKind(400, "A header is invalid"),
    "goal_invalid": ErrorKind(400, "The goal is empty or too long"),
    "goal_refused": ErrorKind(403, "The input guardrail refused the goal"),
    "budget_invalid": ErrorKind(400, "The budget is invalid"),
    "output_type_invalid": ErrorKind(400, "The type of the output has no JSON Schema that can be sent"),
    "approval_invalid": ErrorKind(400, "The approval or its policy is invalid"),
    "deadline_invalid": ErrorKind(400, "The deadline is in the past or not a time"),
    "file_invalid": ErrorKind(400, "A file is missing, too large, or of an unsupported type"),
    "file_unreadable": ErrorKind(400, "A file is damaged or cannot be read"),
    "file_encrypted": ErrorKind(400, "A file is protected with a password"),
    "file_limit_exceeded": ErrorKind(413, "A file exceeds a limit"),
    "arm_unknown": ErrorKind(400, "No arm has that name"),
    "step_unknown": ErrorKind(400, "The plan has no such step"),
    "recording_invalid": ErrorKind(400, "The recording of a task is damaged or cannot be replayed"),
    "host_refused": ErrorKind(400, "The Host header names another server"),
    "body_too_large": ErrorKind(413, "The body is larger than the limit", new_attempt=True),
    "url_too_long": ErrorKind(414, "The URL is longer than the limit"),
    "request_timeout": ErrorKind(408, "The request did not arrive in time", retryable=True),
    "header_too_large": ErrorKind(431, "The headers are larger than the limit"),
    "not_found": ErrorKind(404, "There is no such resource"),
    "task_not_found": ErrorKind(404, "There is no such task"),
    "subscription_not_found": ErrorKind(404, "There is no such subscription"),
    "dead_letter_not_found": ErrorKind(404, "There is no such dead letter"),
    "file_not_found": ErrorKind(404, "There is no such file"),
    "method_not_allowed": ErrorKind(405, "The resource does not have that method"),
    "not_configured": ErrorKind(404, "This feature is not configured"),
    # Who asks
    "token_missing": ErrorKind(401, "A token is needed"),
    "token_malformed": ErrorKind(401, "The token is malformed"),
    "token_expired": ErrorKind(401, "The token has expired", new_attempt=True),
    "token_invalid": ErrorKind(401, "The token is not valid here", new_attempt=True),
    "token_revoked": ErrorKind(401, "The token was revoked"),
    "api_key_invalid": ErrorKind(401, "The API key is not valid"),
    "signature_invalid": ErrorKind(401, "The signature of the delivery is not valid"),
    "login_refused": ErrorKind(403, "The login is valid but grants nothing"),
    "scope_missing": ErrorKind(403, "The token does not allow this"),
    "origin_refused": ErrorKind(403, "Requests from that origin are refused"),
    "url_refused": ErrorKind(403, "Requests to that URL are refused"),
    "host_not_allowed": ErrorKind(403, "The host is not on the allow-list"),
    "authority_missing": ErrorKind(403, "The authority for a required call is missing"),
    "join_refused": ErrorKind(403, "The enrolment was refused"),
    "join_unproven": ErrorKind(503, "The server did not prove that it knows the enrolment token"),
    # State
    "idempotency_conflict": ErrorKind(409, "The idempotency key was used with another body", new_attempt=True),
    "outcome_unknown": ErrorKind(409, "An earlier call with this key may have taken effect"),
    "state_conflict": ErrorKind(409, "The resource is not in a state that allows this"),
    "position_unknown": ErrorKind(409, "The position is beyond the end of the log"),
    "position_expired": ErrorKind(410, "The log no longer has the events after that position"),
    "lease_lost": ErrorKind(409, "Another consumer has these deliveries"),
    "ack_out_of_order": ErrorKind(409, "An earlier delivery of the partition is not acknowledged"),
    "fence_lost": ErrorKind(409, "A newer run holds the task"),
    # Limits
    "rate_limited": ErrorKind(429, "Too many requests", retryable=True),
    "too_many_connections": ErrorKind(429, "Too many live connections", retryable=True),
    "quota_exhausted": ErrorKind(403, "The quota is exhausted"),
    "budget_exhausted": ErrorKind(403, "The task's budget is exhausted"),
    "overloaded": ErrorKind(503, "The service is at its limit", retryable=True),
    "unavailable": ErrorKind(503, "The service or one of its dependencies is unavailable", retryable=True),
    "revocations_unknown": ErrorKind(503, "What is revoked is not known at the moment", retryable=True),
    "draining": ErrorKind(503, "The service is shutting down", retryable=True),
    "connect_failed": ErrorKind(503, "The service could not be reached", retryable=True),
    "connect_timeout": ErrorKind(503, "The service did not accept a connection in time", retryable=True),
    "pool_timeout": ErrorKind(503, "No connection came free in time", retryable=True),
    "read_timeout": ErrorKind(504, "The service did not answer in time", retryable=True),
    "write_timeout": ErrorKind(504, "The service took no bytes in time", retryable=True),
    "connection_lost": ErrorKind(503, "The connection broke before the answer was whole", retryable=True),
    "deadline_exceeded": ErrorKind(504, "The deadline has passed"),
    "cancelled": ErrorKind(409, "The work was cancelled"),
    # Doing the work
    "no_model": ErrorKind(503, "No model is configured"),
    "model_failed": ErrorKind(503, "The model or its provider failed", retryable=True),
    "model_output_invalid": ErrorKind(503, "The model's answer could not be used", new_attempt=True),
    "model_output_truncated": ErrorKind(503, "The model's answer was cut at the token limit", new_attempt=True),
    "model_output_filtered": ErrorKind(503, "The provider's content filter withheld the model's answer"),
    "context_too_long": ErrorKind(400, "The prompt does not fit the model"),
    "no_sandbox": ErrorKind(503, "No sandbox is available"),
    "sandbox_failed": ErrorKind(503, "The sandbox could not run the code", retryable=True),
    "plan_invalid": ErrorKind(503, "The plan could not be used", new_attempt=True),
    "step_stopped": ErrorKind(409, "The arm says that the step cannot succeed"),
    "step_retry": ErrorKind(503, "The arm asks for another attempt of the step", retryable=True, new_attempt=True),
    "approval_rejected": ErrorKind(409, "A person rejected what the task was about to do"),
    "approval_expired": ErrorKind(409, "Nobody approved in time what the task was about to do"),
    "not_accepted": ErrorKind(409, "The result was not accepted", new_attempt=True),
    "output_invalid": ErrorKind(409, "The output does not fit its type"),
    "peer_protocol": ErrorKind(503, "A service answered in a form that is not understood", new_attempt=True),
    # Start
    "arm_invalid": ErrorKind(500, "An arm is declared wrongly"),
    "arm_start_failed": ErrorKind(500, "An arm's lifespan failed"),
    "setting_invalid": ErrorKind(500, "A setting is wrong"),
    "port_taken": ErrorKind(500, "A port is taken"),
    "schema_mismatch": ErrorKind(500, "The database's schema does not fit this version"),
    "home_in_use": ErrorKind(500, "Another process uses this home"),
    "home_unusable": ErrorKind(500, "The home cannot be written"),
    "model_download_failed": ErrorKind(500, "The model could not be fetched"),
    "model_damaged": ErrorKind(500, "The model's file does not have its digest"),
    "internal": ErrorKind(500, "Internal error", new_attempt=True),
}


class OpenAIErrorMember(msgspec.Struct, frozen=True):
    """An error as OpenAI's API has it. Their clients show ``message`` and nothing else."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(msgspec.Struct, frozen=True, omit_defaults=False):
    """An error body: RFC 9457 ``application/problem+json`` with our extension members."""

    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    request_id: str = ""
    type: str = "about:blank"
    errors: tuple[FieldError, ...] = ()
    retry_after: float | msgspec.UnsetType = msgspec.UNSET
    """Seconds to wait at least, if any. It is there for streams, too, whose headers are sent before the failure."""
    error: OpenAIErrorMember | msgspec.UnsetType = msgspec.UNSET
    """The same for OpenAI clients, at the operations of their protocol."""


def to_problem(error: OctoError, request_id: str = "") -> Problem:
    """Describe ``error`` for the wire. A remote problem keeps its status and code."""
    kind = ERROR_KINDS.get(error.code, ERROR_KINDS["internal"])
    status = error.status if isinstance(error, RemoteError) else kind.status
    retryable = kind.retryable if error.retryable is None else error.retryable
    return Problem(
        type=f"urn:octollm:error:{error.code}",
        title=kind.title,
        status=status,
        detail=error.detail,
        code=error.code,
        retryable=retryable,
        request_id=request_id,
        errors=error.field_errors,
        retry_after=msgspec.UNSET if error.retry_after is None else error.retry_after,
    )


def to_openai_problem(error: OctoError, request_id: str = "") -> Problem:
    """Describe ``error`` as :func:`to_problem` does, with the member ``error`` that an OpenAI client reads."""
    problem = to_problem(error, request_id)
    message, param = problem.detail, None
    if problem.errors:
        first = problem.errors[0]
        param = _openai_param(first.pointer)
        # These clients show the message alone, so it has to name the fault.
        message = message if first.detail in message else f"{message} {first.pointer}: {first.detail}"
    return msgspec.structs.replace(
        problem, error=OpenAIErrorMember(message, _openai_type(problem), param, problem.code)
    )


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def _openai_type(problem: Problem) -> str:
    if problem.code == "budget_exhausted":
        return "insufficient_quota"
    return _OPENAI_TYPES.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error")


def _openai_param(pointer: str) -> str | None:
    """Return a JSON Pointer in OpenAI's notation: ``/messages/0/content`` is ``messages[0].content``."""
    param = ""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        param += f"[{name}]" if name.isdecimal() and param else f".{name}" if param else name
    return param or None


def allows_new_attempt(error: OctoError) -> bool:
    """Return whether another attempt of a step can succeed after ``error``.

    It can when the problem document is ``retryable``, or when the code is one of those that an attempt brings about
    itself. A code that is not in the table says nothing more than its problem document.
    """
    kind = ERROR_KINDS.get(error.code)
    return to_problem(error).retryable or (kind is not None and kind.new_attempt)
