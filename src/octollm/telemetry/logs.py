"""JSON logs: one object a line, with the ids of the work at hand and secrets masked."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Protocol, cast

import msgspec
import structlog

from octollm.clock import Clock, iso
from octollm.context import current_scene
from octollm.telemetry.masking import mask

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Log(Protocol):
    """What a service writes its log with. Keyword arguments become members of the line."""

    def debug(self, event: str, **members: object) -> None:
        """Write for a developer."""
        ...

    def info(self, event: str, **members: object) -> None:
        """Write what happened."""
        ...

    def warning(self, event: str, **members: object) -> None:
        """Write what somebody should look at one day."""
        ...

    def error(self, event: str, **members: object) -> None:
        """Write what somebody should look at now."""
        ...


type_of_line = MutableMapping[str, object]


def _line_maker(clock: Clock) -> Callable[[object, str, type_of_line], type_of_line]:
    def make(_logger: object, level: str, line: type_of_line) -> type_of_line:
        scene = current_scene()
        out: dict[str, object] = {
            "timestamp": iso(clock.now()),
            "level": level,
            "service": line.pop("service", "") or scene.service,
            "event": line.pop("event", ""),
        }
        if scene.request_id:
            out["request_id"] = scene.request_id
        if scene.correlation_id:
            out["correlation_id"] = scene.correlation_id
        if scene.trace is not None:
            out["trace_id"], out["span_id"] = scene.trace.trace_id, scene.trace.span_id
        if scene.task_id:
            out["task_id"] = scene.task_id
        if scene.step:
            out["step"] = scene.step
        error = line.pop("error", None)
        out |= cast("dict[str, object]", mask(dict(line)))
        if error is not None:
            out["error"] = mask(f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error)
        return out

    return make


def _render(_logger: object, _level: str, line: type_of_line) -> str:
    return msgspec.json.encode(dict(line), enc_hook=str).decode()


class _Stream:
    """A logger that writes lines to one stream; a full disk must not stop the work."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError) as error:
            # The last resort: where logs cannot be written, standard error says so.
            print(f"octollm: the log cannot be written: {error}", file=sys.stderr)  # noqa: T201

    debug = info = warning = error = critical = msg


class _Library(logging.Handler):
    """Warnings of the libraries that we use, as lines of our own log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        write("library.message", library=record.name, message=record.getMessage())


@contextmanager
def _logs_to(stream: IO[str], level: str, clock: Clock) -> Generator[None]:
    structlog.configure(
        processors=[_line_maker(clock), _render],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_args: _Stream(stream),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    handler = _Library(log_for("library"))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        structlog.reset_defaults()


@contextmanager
def _open(path: Path | None) -> Generator[IO[str]]:
    if path is None:
        yield sys.stderr
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        yield stream


def configure_logs(path: Path | None, *, level: str, clock: Clock) -> AbstractContextManager[None]:
    """Send this process's logs to ``path`` (appended), or to standard error when it is ``None``.

    The process that hosts services calls it once and leaves the context when it ends.
    """

    @contextmanager
    def configured() -> Generator[None]:
        with _open(path) as stream, _logs_to(stream, level, clock):
            yield

    return configured()


def log_for(service: str) -> Log:
    """Return the log of ``service``."""
    return cast("Log", structlog.get_logger(service=service))
