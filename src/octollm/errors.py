"""The error tree: every failure that may reach a caller is an OctoError with a stable code. The codes, their HTTP status and whether a retry can help are in octollm.contracts.problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldError:
    """One fault of a request: where it is and what is wrong there.

    ``pointer`` is a JSON Pointer (RFC 6901) into the body; the empty string is the whole body.
    """

    pointer: str
    detail: str


@dataclass(frozen=True, slots=True)
class CallAttempts:
    """What was tried before a call to another service failed: the last ``instance``, how often, in how many seconds."""

    service: str
    operation: str
    instance: str
    attempts: int
    seconds: float


class OctoError(Exception):
    """A failure with a stable ``code``.

    ``detail`` says what happened and what to do next, in one or two sentences, and never holds a secret.
    ``retry_after`` is in seconds. ``tried`` is set where it ended a call. ``cause_chain`` is left to ``raise … from``.
    """

    code = "internal"
    call_attempts: CallAttempts | None = None

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        field_errors: Sequence[FieldError] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        if code is not None:
            self.code = code
        self.field_errors = tuple(field_errors)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class SettingError(OctoError):
    """A setting is wrong; refused at start with its name and what would be right."""

    code = "setting_invalid"


class RemoteError(OctoError):
    """A peer answered with a problem document; ``status`` and ``retryable`` are its own words."""

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int,
        retryable: bool,
        field_errors: Sequence[FieldError] = (),
        retry_after: float | None = None,
        service: str = "",
    ) -> None:
        super().__init__(detail, code=code, field_errors=field_errors, retry_after=retry_after)
        self.status = status
        self.retryable = retryable
        self.service = service
