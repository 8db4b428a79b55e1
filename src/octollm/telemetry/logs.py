"""Structured logging: JSON lines with the request context, secrets masked; the access log of served calls; a buffered writer."""

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
from octollm.telemetry.masking import mask

FLUSH_SECONDS = 0.1
"""How long a line may wait to be written with others."""
_MAX_LINES = 1024
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Logger(Protocol):
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


class _AccessLogLine(msgspec.Struct, omit_defaults=True):
    """The line of a call that was served, in the order in which lines have their members."""

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
    """A logger that writes lines to one stream; a full disk must not stop the work.

    A line per call must not cost a write per call: a line after a silence is written at once, those that follow it
    together, at most ``FLUSH_SECONDS`` later; a warning never waits. A process that is killed meanwhile leaves those
    lines unwritten.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._adding = threading.Lock()
        self._writing = threading.Lock()
        self._news = threading.Event()
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write_on, name="log", daemon=True)
        self._writer.start()

    def msg(self, line: str) -> None:
        with self._adding:
            self._lines.append(line)
            full = len(self._lines) >= _MAX_LINES
        if full:
            self.flush()
        elif not self._news.is_set():
            self._news.set()

    debug = info = msg

    def write_now(self, line: str) -> None:
        with self._adding:
            self._lines.append(line)
        self.flush()

    warning = error = critical = write_now

    def flush(self) -> None:
        """Write what there is."""
        with self._writing:
            with self._adding:
                lines, self._lines = self._lines, []
            if not lines:
                return
            try:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()
            except (OSError, ValueError) as error:
                # The last resort: where logs cannot be written, standard error says so.
                print(f"octollm: the log cannot be written: {error}", file=sys.stderr)  # noqa: T201

    def close(self) -> None:
        """Write what there is, for the last time."""
        self._closed.set()
        self._news.set()
        self._writer.join(timeout=5)
        self.flush()

    def _write_on(self) -> None:
        while not self._closed.is_set():
            self._news.wait()
            self._news.clear()
            self.flush()
            self._closed.wait(FLUSH_SECONDS)


class _LibraryHandler(logging.Handler):
    """Warnings of the libraries that we use, as lines of our own log."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        write("library.message", library=record.name, message=record.getMessage())


class _Sink:
    """Where lines go while logs are configured."""

    def __init__(self, lines: _BufferedWriter, level: int, clock: Clock) -> None:
        self.lines = lines
        self.level = level
        self._clock = clock
        self._second = 0
        self._start = ""

    def time(self) -> str:
        """Return this moment as lines have it; most of it is that of the line before."""
        now = self._clock.now()
        second = int(now)
        if second != self._second:
            self._second, self._start = second, format_rfc3339(second)[:-4]
        return f"{self._start}{int((now - second) * 1000):03d}Z"

    def __call__(self, *_args: object) -> _BufferedWriter:
        return self.lines


class AccessLog:
    """The log of the calls that a service served: a line for each, at a tenth of what other lines cost.

    Nothing in it is free text, so that nothing has to be masked.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._encode = msgspec.json.Encoder().encode

    def log_call(self, operation: str, status: int, seconds: float, *, quiet: bool = False) -> None:
        """Write that a call was served; one that is ``quiet`` is for a developer only."""
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
    """Send this process's logs to ``path`` (appended), or to standard error when it is ``None``.

    The process that hosts services calls it once and leaves the context when it ends.
    """

    @contextmanager
    def configured() -> Generator[None]:
        with _open(path) as stream, _logs_to(stream, level, clock):
            yield

    return configured()


def get_logger(service: str) -> Logger:
    """Return the log of ``service``."""
    return cast("Logger", structlog.get_logger(service=service))
