"""The error tree: every failure that may reach a caller is an :class:`OctoError` with a stable code.

``octollm.contracts.problems`` lists the codes with their HTTP status and whether a retry can help.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Literal, TypeVar


@dataclass(frozen=True, slots=True)
class FieldError:
    """One invalid field of a request.

    ``pointer`` is a JSON Pointer (RFC 6901) into the body; the empty string is the whole body.
    """

    pointer: str
    detail: str


_PATH = re.compile(r" - at `(?:key in )?\$([^`]*)`$")
_PART = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def escape_pointer(part: str) -> str:
    """Return one part of a JSON Pointer (RFC 6901 section 3)."""
    return part.replace("~", "~0").replace("/", "~1")


def parse_field_error(message: str, prefix: str = "") -> FieldError:
    """Return the fault that a message of ``msgspec.ValidationError`` describes, at a place below ``prefix``."""
    match = _PATH.search(message)
    parts = [name or index for name, index in _PART.findall(match[1])] if match is not None else []
    return FieldError(prefix + "".join("/" + escape_pointer(part) for part in parts), _PATH.sub("", message))


@dataclass(frozen=True, slots=True)
class CallAttempts:
    """The attempts of a call to another service that failed: how many, their seconds, and the last ``instance``."""

    service: str
    operation: str
    instance: str
    attempts: int
    seconds: float


class OctoError(Exception):
    """A failure with a stable ``code``.

    ``detail`` says in one or two sentences what happened and what to do next; it never holds a secret.
    ``retry_after`` is in seconds. ``call_attempts`` is set when the failure ended a call to another service.
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

    @property
    def retryable(self) -> bool | None:
        """Whether the same request again can help; ``None`` leaves it to the code's entry in the table of codes."""
        return None

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class SettingError(OctoError):
    """A setting is invalid; the detail names it and the valid values."""

    code = "setting_invalid"


class ArmError(OctoError):
    """An arm is declared in a way that cannot work; the detail says what to write instead."""

    code = "arm_invalid"


class StopStep(OctoError):  # noqa: N818  an instruction to the runner, as StopIteration is
    """Raised by an arm: the step cannot succeed, so no further attempt is made.

    Every watcher of the task sees ``detail``. On the wire ``retryable`` is false.
    """

    code = "step_stopped"

    def __init__(self, detail: str, *, field_errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail, field_errors=field_errors)

    @property
    def retryable(self) -> bool:
        """False: another attempt would fail as well."""
        return False


class RetryStep(OctoError):  # noqa: N818
    """Raised by an arm: another attempt of the step can succeed, ``after`` seconds from now at the earliest.

    An attempt is counted against the task's ``max_retries``. ``detail`` is among ``task.context.reasons`` of the next
    attempt. On the wire ``retryable`` is true and ``retry_after`` has the seconds.
    """

    code = "step_retry"

    def __init__(self, detail: str, *, after: float = 0.0, field_errors: Sequence[FieldError] = ()) -> None:
        if not 0 <= after < float("inf"):
            raise ValueError(f"RetryStep(after={after!r}): after is a number of seconds, 0 or more.")
        super().__init__(detail, field_errors=field_errors, retry_after=after or None)

    @property
    def retryable(self) -> bool:
        """True: another attempt can succeed."""
        return True


class RemoteError(OctoError):
    """A service responded with a problem document (RFC 9457), from which ``status`` and ``retryable`` are taken."""

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
        self.service = service
        self._retryable = retryable

    @property
    def retryable(self) -> bool:
        """Whether a repeat of the request can help, as the peer's problem document states."""
        return self._retryable


E = TypeVar("E", bound=Exception)


def map_exceptions(
    translation: Exception | Callable[[E], Exception | None], *kinds: type[E]
) -> AbstractContextManager[None]:
    """Translate exceptions of another library at its boundary: raise ``translation`` from those of ``kinds``.

    A function returns the exception to raise, or ``None`` to leave that one unchanged. Other types pass unchanged. It
    works around ``await`` as well.
    """
    return _ExceptionMap(translation, kinds)


def map_file_errors(path: Path, action: Literal["read", "written"], *, code: str) -> AbstractContextManager[None]:
    """Raise ``code`` with the operating system's reason for an ``OSError``: ``path`` cannot be read or written."""
    return map_exceptions(lambda error: OctoError(f"{path} cannot be {action}: {error.strerror}.", code=code), OSError)


class _ExceptionMap(AbstractContextManager[None], Generic[E]):
    # A class: as a generator it would cost three times as much, and calls of Redis and the database pass through it.
    __slots__ = ("_kinds", "_translation")

    def __init__(self, translation: Exception | Callable[[E], Exception | None], kinds: tuple[type[E], ...]) -> None:
        self._translation = translation
        self._kinds = kinds

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, self._kinds):
            return
        translation = self._translation
        translated = translation if isinstance(translation, Exception) else translation(error)
        if translated is not None:
            raise translated from error
