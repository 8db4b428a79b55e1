"""Structured logging: JSON lines with the request context and masked secrets, and the access log of served requests.

Lines pass through one buffered writer, so that a line per request does not cost a system call per request.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Generator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Protocol, cast

import msgspec
import structlog

from octollm.clock import Clock, format_rfc3339
from octollm.context import current_context
from octollm.masking import mask

FLUSH_SECONDS = 0.1
"""The longest time that a line waits in the buffer."""
_MAX_LINES = 1024
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Logger(Protocol):
    """A structured logger. ``event`` names the event; keyword arguments become members of the line."""

    def debug(self, event: str, **members: object) -> None:
        """Log detail for debugging."""
        ...

    def info(self, event: str, **members: object) -> None:
        """Log a normal event."""
        ...

    def warning(self, event: str, **members: object) -> None:
        """Log an event that needs attention, but not now."""
        ...

    def error(self, event: str, **members: object) -> None:
        """Log a failure that needs attention now."""
        ...


class _AccessLogLine(msgspec.Struct, omit_defaults=True):
    """The line of a served request. Members are in the order of all other lines."""

    timestamp: str
    level: str
    service: str
    event: str
    request_id: str
    correlation_id: str
    trace_id: str
    span_id: str
    operation: str
    status: int
    duration_ms: float
    task_id: str = ""
    step: str = ""


LogLine = MutableMapping[str, object]


def _line_processor(clock: Clock) -> Callable[[object, str, LogLine], LogLine]:
    def make(_logger: object, level: str, line: LogLine) -> LogLine:
        context = current_context()
        out: dict[str, object] = {
            "timestamp": format_rfc3339(clock.now()),
            "level": level,
            "service": line.pop("service", "") or context.service,
            "event": line.pop("event", ""),
        }
        if context.request_id:
            out["request_id"] = context.request_id
        if context.correlation_id:
            out["correlation_id"] = context.correlation_id
        if context.trace is not None:
            out["trace_id"], out["span_id"] = context.trace.trace_id, context.trace.span_id
        if context.task_id:
            out["task_id"] = context.task_id
        if context.step:
            out["step"] = context.step
        error = line.pop("error", None)
        out |= cast("dict[str, object]", mask(dict(line)))
        if error is not None:
            out["error"] = mask(f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error)
        return out

    return make


def _render(_logger: object, _level: str, line: LogLine) -> str:
    return msgspec.json.encode(dict(line), enc_hook=str).decode()


class _BufferedWriter:
    """A thread that writes lines to one stream in batches. A stream that cannot be written never stops the caller.

    A line after a pause is written at once; those that follow are written together, at most ``FLUSH_SECONDS`` later.
    Warnings and errors are written at once. A process that is killed loses the lines in the buffer.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lines: list[str] = []
        # Two locks, so that a thread that adds a line does not wait for a slow disk.
        self._lines_lock = threading.Lock()
        self._stream_lock = threading.Lock()
        self._has_lines = threading.Event()
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._run, name="log", daemon=True)
        self._writer.start()

    def msg(self, line: str) -> None:
        with self._lines_lock:
            self._lines.append(line)
            full = len(self._lines) >= _MAX_LINES
        if full:
            self.flush()
        elif not self._has_lines.is_set():
            self._has_lines.set()

    debug = info = msg

    def write_now(self, line: str) -> None:
        with self._lines_lock:
            self._lines.append(line)
        self.flush()

    warning = error = critical = write_now

    def flush(self) -> None:
        """Write the buffered lines."""
        with self._stream_lock:
            with self._lines_lock:
                lines, self._lines = self._lines, []
            if not lines:
                return
            try:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()
            except (OSError, ValueError) as error:
                # Standard error is the last resort: the log itself cannot report this.
                print(f"octollm: the log cannot be written: {error}", file=sys.stderr)  # noqa: T201

    def close(self) -> None:
        """Stop the thread and write the remaining lines."""
        self._closed.set()
        self._has_lines.set()
        self._writer.join(timeout=5)
        self.flush()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._has_lines.wait()
            self._has_lines.clear()
            self.flush()
            self._closed.wait(FLUSH_SECONDS)


class _LibraryHandler(logging.Handler):
    """A handler of the standard library's logging that writes warnings of other libraries to our log."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        write("library.message", library=record.name, message=record.getMessage())


class _Sink:
    """structlog's logger factory: the writer and level of the current configuration."""

    def __init__(self, lines: _BufferedWriter, level: int, clock: Clock) -> None:
        self.lines = lines
        self.level = level
        self._clock = clock
        self._second = 0
        self._prefix = ""

    def time(self) -> str:
        """Return the current time in RFC 3339; the part up to the second is cached."""
        now = self._clock.now()
        second = int(now)
        if second != self._second:
            self._second, self._prefix = second, format_rfc3339(second)[:-4]
        return f"{self._prefix}{int((now - second) * 1000):03d}Z"

    def __call__(self, *_args: object) -> _BufferedWriter:
        return self.lines


class AccessLog:
    """The access log of one service: a line for each request, at a tenth of the cost of an ordinary line.

    It bypasses structlog's processors. No member is free text, so nothing needs masking.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._encode = msgspec.json.Encoder().encode

    def log_call(self, operation: str, status: int, seconds: float, *, quiet: bool = False) -> None:
        """Log a served request; ``quiet`` lowers its level from info to debug."""
        sink = structlog.get_config()["logger_factory"]
        if not isinstance(sink, _Sink) or sink.level > (10 if quiet else 20):
            return
        context = current_context()
        trace = context.trace
        line = _AccessLogLine(
            sink.time(),
            "debug" if quiet else "info",
            self._service,
            "call.served",
            context.request_id,
            context.correlation_id,
            "" if trace is None else trace.trace_id,
            "" if trace is None else trace.span_id,
            operation,
            status,
            round(seconds * 1000, 2),
            context.task_id,
            context.step,
        )
        sink.lines.msg(self._encode(line).decode())


@contextmanager
def _logs_to(stream: IO[str], level: str, clock: Clock) -> Generator[None]:
    lines = _BufferedWriter(stream)
    structlog.configure(
        processors=[_line_processor(clock), _render],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=_Sink(lines, _LEVELS[level], clock),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    handler = _LibraryHandler(get_logger("library"))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        structlog.reset_defaults()
        lines.close()


@contextmanager
def _open(path: Path | None) -> Generator[IO[str]]:
    if path is None:
        yield sys.stderr
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        yield stream


def configure_logging(path: Path | None, *, level: str, clock: Clock) -> AbstractContextManager[None]:
    """Write this process's logs to ``path`` (appended), or to standard error when it is ``None``.

    The process that hosts the services enters this context once, at its start.
    """

    @contextmanager
    def configured() -> Generator[None]:
        with _open(path) as stream, _logs_to(stream, level, clock):
            yield

    return configured()


def get_logger(service: str) -> Logger:
    """Return a logger whose lines name ``service``."""
    return cast("Logger", structlog.get_logger(service=service))
