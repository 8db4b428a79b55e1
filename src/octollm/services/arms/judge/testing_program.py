"""The program that runs tests inside the sandbox. It is sent there as text and needs the standard library only.

Usage: ``python <this file> PAYLOAD``. The payload holds the tests as a program of observations
(:mod:`octollm.services.arms.judge.instrumentation`). The program prints lines: a nonce, then one JSON array each. It
decides nothing by itself: the judge compares what it observed with values that never enter the sandbox.

The code under test runs in this process, so it can write whatever it likes into the report. It cannot read the expected
values here. What remains possible for it: to guess the outcome of an assertion of few outcomes (``assert is_even(2)``),
and to forge what is compared in the sandbox, because the tests compute the expected value or compare objects of the
code's own classes.
"""

# It looks at values of any type, whose items have no type that could be known.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import builtins
import hashlib
import inspect
import io
import json
import math
import operator
import os
import re
import sys
import traceback
import types
import unittest
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` takes time to import
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

RECORDER = "_octollm"
"""The name of the recorder among the globals of the tests."""
MAX_ERRORS = 16
MAX_TEXT = 300
MAX_SHOWN = 160
MAX_MESSAGE = 4000
MAX_DEPTH = 40
REPORT_BYTES = 700 * 1024
"""Bytes of the whole report; a value that would exceed its share of the rest is sent as a digest."""

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "is": operator.is_,
    "is not": operator.is_not,
    "in": lambda one, other: one in other,
    "not in": lambda one, other: one not in other,
}


def evaluate(op: str, values: Sequence[Any]) -> bool:
    """Return whether an assertion holds for its operands. ``op`` is an operator, or several in a chain: ``<,<=``."""
    if op == "truth":
        return bool(values[0])
    if op == "instance":
        return isinstance(values[0], values[1])
    if op in ("within", "within or at"):
        distance = abs(values[0] - values[1])
        return bool(distance <= values[2] if op == "within or at" else distance < values[2])
    if op == "almost":
        return is_almost_equal(*values)
    if op == "approx":
        return all_close(values[0], values[1], *values[2:])
    if op == "same items":
        return has_same_items(list(values[0]), list(values[1]))
    parts = op.split(",")
    return all(_COMPARISONS[part](values[at], values[at + 1]) for at, part in enumerate(parts))


def is_almost_equal(first: Any, second: Any, places: int | None = None, delta: Any = None) -> bool:
    """Compare as ``unittest`` does: to ``places`` decimal places, or within ``delta``."""
    if first == second:
        return True
    difference = abs(first - second)
    return bool(difference <= delta if delta is not None else round(difference, 7 if places is None else places) == 0)


def all_close(value: Any, expected: Any, rel: float | None = None, tolerance: float | None = None) -> bool:
    """Compare as ``pytest.approx`` does, item by item."""
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and value.keys() == expected.keys()
            and all(all_close(value[key], expected[key], rel, tolerance) for key in expected)
        )
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(expected)
            and all(all_close(one, other, rel, tolerance) for one, other in zip(value, expected, strict=True))
        )
    if value == expected:
        return True
    if rel is None and tolerance is not None:
        return abs(value - expected) <= tolerance
    most = max((1e-6 if rel is None else rel) * abs(expected), 1e-12 if tolerance is None else tolerance)
    return bool(math.isfinite(expected) and abs(value - expected) <= most)


def has_same_items(first: list[Any], second: list[Any]) -> bool:
    """Return whether two lists hold equal items, in any order."""
    for item in first:
        if item not in second:
            return False
        second.remove(item)
    return not second


class HiddenValue:
    """Stands in the tests for an expected value that stayed with the judge."""

    def __init__(self, number: int) -> None:
        """Name the value by its number."""
        self.number = number

    def __repr__(self) -> str:
        """Say what it is: nothing can be computed with it."""
        return "<expected value>"


def encode(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON data: plain types by their exact type, anything else as the name of its type.

    Nothing that a class defines is asked, but for the text that shows it. A subclass of a plain type counts as that
    type as long as it compares like it.
    """
    kind = type(value)
    if kind is HiddenValue:
        return {"t": "sealed", "v": value.number}
    if value is None or kind is bool:
        return value
    if depth > MAX_DEPTH:
        return {"t": "opaque", "v": ["nested too deep", "…", []]}
    for base, name, write in _encoders():
        if kind is base or (base in kind.__mro__ and base in _OPEN_TYPES and kind.__eq__ is base.__eq__):
            data = write(value, depth + 1)
            return data if name is None else {"t": name, "v": data}
    return opaque(value, kind)


def opaque(value: Any, kind: type[Any]) -> dict[str, Any]:
    """Return what is told of a value that is not plain."""
    bases = [base.__name__ for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base]
    try:
        shown = repr(value)[:MAX_SHOWN]
    except BaseException:
        shown = object.__repr__(value)
    return {"t": "opaque", "v": [f"{kind.__module__}.{kind.__qualname__}"[:MAX_SHOWN], str(shown), bases]}


def digest(data: Any) -> str:
    """Return the digest of encoded data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _items(values: Iterable[Any], depth: int) -> list[Any]:
    return [encode(item, depth) for item in values]


def _unordered(values: Iterable[Any], depth: int) -> list[Any]:
    return sorted(_items(values, depth), key=json.dumps)


def _pairs(value: dict[Any, Any], depth: int) -> list[Any]:
    return sorted(([encode(k, depth), encode(v, depth)] for k, v in dict.items(value)), key=json.dumps)


def _integer(value: int, _depth: int) -> Any:
    plain = int.__index__(value)
    return plain if -(2**53) < plain < 2**53 else {"t": "int", "v": int.__format__(plain, "x")}


_OPEN_TYPES: set[type[Any]] = {int, float, str, bytes, list, tuple, dict, set, frozenset}
_PLAIN_ENCODERS: list[tuple[type[Any], str | None, Callable[[Any, int], Any]]] = [
    (int, None, _integer),
    (str, None, lambda v, _: str.__str__(v)),
    (float, "float", lambda v, _: float.hex(v)),
    (list, None, lambda v, d: _items(list.__iter__(v), d)),
    (tuple, "tuple", lambda v, d: _items(tuple.__iter__(v), d)),
    (dict, "dict", _pairs),
    (set, "set", lambda v, d: _unordered(set.__iter__(v), d)),
    (frozenset, "frozenset", lambda v, d: _unordered(frozenset.__iter__(v), d)),
    (bytes, "bytes", lambda v, _: bytes.hex(v)),
    (bytearray, "bytearray", lambda v, _: bytearray.hex(v)),
    (complex, "complex", lambda v, _: [float.hex(v.real), float.hex(v.imag)]),
    (range, "range", lambda v, d: [encode(v.start, d), encode(v.stop, d), encode(v.step, d)]),
    (type({}.keys()), "set", _unordered),
    (type({}.items()), "set", _unordered),
    (type(...), "ellipsis", lambda _v, _d: 0),
]
_LIBRARY_ENCODERS: list[tuple[str, str, str, Callable[[Any, int], Any]]] = [
    ("collections", "Counter", "Counter", _pairs),
    ("collections", "OrderedDict", "OrderedDict", lambda v, d: [[encode(k, d), encode(x, d)] for k, x in v.items()]),
    ("collections", "defaultdict", "dict", _pairs),
    ("collections", "deque", "deque", _items),
    ("decimal", "Decimal", "Decimal", lambda v, _: str(v)),
    ("fractions", "Fraction", "Fraction", lambda v, _: [f"{v.numerator:x}", f"{v.denominator:x}"]),
    ("datetime", "datetime", "datetime", lambda v, _: v.isoformat()),
    ("datetime", "date", "date", lambda v, _: v.isoformat()),
    ("datetime", "time", "time", lambda v, _: v.isoformat()),
    ("datetime", "timedelta", "timedelta", lambda v, _: [v.days, v.seconds, v.microseconds]),
    ("uuid", "UUID", "UUID", lambda v, _: str(v)),
    ("pathlib", "PosixPath", "Path", lambda v, _: str(v)),
    ("pathlib", "PurePosixPath", "Path", lambda v, _: str(v)),
]


def _encoders() -> Iterator[tuple[type[Any], str | None, Callable[[Any, int], Any]]]:
    """Yield the encoders; those of library types only where somebody has imported them."""
    yield from _PLAIN_ENCODERS
    for module, attribute, name, write in _LIBRARY_ENCODERS:
        base = getattr(sys.modules.get(module), attribute, None)
        if isinstance(base, type):
            yield base, name, write


def has_opaque(data: Any) -> bool:
    """Return whether encoded data has a part that is no value of a plain type."""
    if isinstance(data, dict):
        return data["t"] in ("opaque", "digest") or has_opaque(data["v"])
    return isinstance(data, list) and any(map(has_opaque, data))


class ExceptionObserver:
    """A ``with`` block whose exception is observed. ``kind`` is the class to catch where the tests define it."""

    def __init__(self, recorder: Recorder, number: int, kind: Any, *, catches_all: bool, pattern: Any) -> None:
        """Catch ``kind``, or any exception where only the judge knows which one is expected."""
        self._recorder, self._number, self._kind, self._pattern = recorder, number, kind, pattern
        self._caught = BaseException if catches_all else Exception
        self.exception: BaseException | None = None
        self.value: BaseException | None = None
        self.type: type[BaseException] | None = None

    def __enter__(self) -> ExceptionObserver:
        """Begin the block."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Observe the exception; swallow it where it may be the expected one."""
        if error is None:
            self._recorder.add(self._number, None, ["nothing"])
            return False
        if not isinstance(error, self._caught if self._kind is None else self._kind):
            return False
        self.exception = self.value = error.with_traceback(None)
        self.type = type(error)
        names = [base.__name__ for base in type(error).__mro__ if getattr(builtins, base.__name__, None) is base]
        said = str(error)
        inside = None if self._kind is None and self._pattern is None else True
        if self._pattern is not None:
            inside = re.search(self._pattern, said) is not None
        self._recorder.add(self._number, inside, ["raised", type(error).__name__, names, said[:MAX_MESSAGE]])
        return True

    def match(self, pattern: str) -> None:
        """Do what the context of ``pytest.raises`` does."""
        assert re.search(pattern, str(self.exception)), f"{pattern!r} is not in {str(self.exception)!r}"


class Recorder:
    """Writes observations to the report. The tests reach it by the name :data:`RECORDER`."""

    def __init__(self, nonce: str, descriptor: int) -> None:
        """Write to ``descriptor``, each line after ``nonce``."""
        self._write, self._descriptor, self._nonce = os.write, descriptor, nonce
        self._lock = allocate_lock()
        self._waiting: list[Any] | None = None
        self._sent, self._room = 0, REPORT_BYTES

    def send(self, *event: Any) -> None:
        """Send one event, after the observation that waits."""
        with self._lock:
            self._flush()
            self._send(event)

    def add(self, number: int, inside: bool | None, values: list[Any]) -> None:
        """Add one observation; a repetition of the last one is counted instead."""
        with self._lock:
            if self._waiting and self._waiting[:3] == [number, inside, values]:
                self._waiting[3] += 1
                return
            self._flush()
            self._waiting = [number, inside, values, 1]

    def _flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, None
            self._send(("observed", *waiting))

    def _send(self, event: tuple[Any, ...]) -> None:
        line = f"{self._nonce}{json.dumps([self._sent, *event])}\n".encode()
        self._sent += 1
        self._room -= len(line)
        rest = memoryview(line)
        while rest:
            rest = rest[self._write(self._descriptor, rest) :]

    def check(self, number: int, op: str | None, *values: Any) -> None:
        """Observe the operands of an assertion. ``op`` is given where they can be compared here at all."""
        encoded = [self._bounded(encode(value)) for value in values]
        inside = None
        if op and any(map(has_opaque, encoded)) and not any(type(value) is HiddenValue for value in values):
            inside = evaluate(op, values)
        self.add(number, inside, encoded)

    def raises(
        self, number: int, kind: Any = None, catches_all: bool = False, pattern: Any = None
    ) -> ExceptionObserver:
        """Observe the exception of a ``with`` block; ``pattern`` is given where it has to be searched for here."""
        return ExceptionObserver(self, number, kind, catches_all=catches_all, pattern=pattern)

    def sealed(self, number: int) -> HiddenValue:
        """Return what stands for an expected value."""
        return HiddenValue(number)

    def cases(self, names: Any, rows: Any) -> Callable[[Callable[..., Any]], Callable[..., None]]:
        """Do what ``pytest.mark.parametrize`` does, in one test."""
        columns: list[str] = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

        def decorate(function: Callable[..., Any]) -> Callable[..., None]:
            def run_cases(**given: Any) -> None:
                for row in rows:
                    function(**given, **dict(zip(columns, row if len(columns) > 1 else (row,), strict=True)))

            run_cases.__name__ = function.__name__
            return run_cases

        return decorate

    def _bounded(self, data: Any) -> Any:
        size = len(json.dumps(data))
        if size <= max(200, self._room // 2):
            return data
        return {"t": "digest", "v": [digest(data), json.dumps(data)[:MAX_SHOWN]]}


class Result(unittest.TestResult):
    """Reports how each test began and ended."""

    def __init__(self, recorder: Recorder, filename: str) -> None:
        """Report to ``recorder``; lines are those of ``filename``."""
        super().__init__()
        self._recorder, self._filename, self._errors = recorder, filename, 0

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802 - the name is unittest's
        """Report the beginning of a test."""
        self._send("test", test.id().split(".", 1)[-1])
        super().startTest(test)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        """Report a test that was skipped."""
        self._send("skipped", str(reason)[:MAX_TEXT])

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Report an exception."""
        self._report(err[1])

    addFailure = addError  # noqa: N815

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Report an exception in a subtest."""
        if err is not None:
            self._report(err[1])

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Report a test that passed and should not have."""
        self._send("error", "a test passed that was expected to fail", 0)

    def _report(self, error: BaseException) -> None:
        self._errors += 1
        if self._errors <= MAX_ERRORS:
            self._send("error", *explain(error, self._filename))

    def _send(self, *event: Any) -> None:
        self._recorder.send(*event)


def explain(error: BaseException, filename: str) -> tuple[str, int]:
    """Return the text of an exception, and the last line of the tests that it went through."""
    line = 0
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == filename:
            line = number
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"[:MAX_TEXT], line
    text = "".join(traceback.TracebackException(type(error), error, None).format_exception_only()).strip()
    return text.split("\n")[0][:MAX_TEXT], line


def collect(module: types.ModuleType) -> unittest.TestSuite:
    """Return the cases of a module, its test functions among them."""
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    for name, value in list(vars(module).items()):
        if not name.startswith("test") or not isinstance(value, types.FunctionType):
            continue
        if not value.__code__.co_argcount:
            function = run_async(value) if inspect.iscoroutinefunction(value) else value
            suite.addTest(unittest.FunctionTestCase(function, description=name))
    return suite


def run_async(function: Callable[[], Any]) -> Callable[[], None]:
    """Return a plain function that awaits ``function``."""

    def run() -> None:
        import asyncio  # noqa: PLC0415 - few tests need it, and it is slow

        asyncio.run(function())

    run.__name__ = function.__name__
    return run


def main(payload: Mapping[str, str]) -> None:
    """Run the tests of the payload, and report."""
    name, filename = payload["module"], payload["filename"]
    descriptor = 1
    if hasattr(os, "dup2"):
        # What the code prints by way of the descriptor is not part of the report.
        descriptor = os.dup(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
    sys.stdout = io.StringIO()
    end = os._exit
    recorder = Recorder(payload["nonce"], descriptor)
    result = Result(recorder, filename)
    module = types.ModuleType(name)
    module.__file__ = filename
    vars(module)[RECORDER] = recorder
    sys.modules[name] = module
    try:
        exec(compile(payload["tests"], filename, "exec", dont_inherit=True), vars(module))  # noqa: S102 - the sandbox is where the tests run
        collect(module).run(result)
    except BaseException as error:
        recorder.send("failed", *explain(error, filename))
    recorder.send("end")
    # What the code under test has left for the end of the program may not add a line of its own.
    end(0)


if __name__ == "__main__":
    path, program = sys.argv[1], __file__
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        text = file.read()
    with open(program, encoding="utf-8") as file:  # noqa: PTH123
        source = file.read()
    # The code under test finds neither the tests nor this program, and replaces no builtin that the program uses.
    for name in (path, program):
        os.unlink(name)  # noqa: PTH108
    del sys.argv[1:]
    scope: dict[str, Any] = {"__builtins__": dict(vars(builtins)), "__name__": "octollm_testing"}
    exec(compile(source, "<octollm>", "exec"), scope)  # noqa: S102
    scope["main"](json.loads(text))
