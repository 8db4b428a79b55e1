"""Reads the report of a test run and compares what was observed with the values that never entered the sandbox.

Nothing in a report is believed but the observed values themselves: a report that is incomplete, out of order or
without the failure of the control test is refused as a whole.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from octollm.services.arms.judge.assertions import Assertion
from octollm.services.arms.judge.instrumentation import InstrumentedTests
from octollm.services.arms.judge.testing_program import digest, encode, evaluate, has_opaque

MAX_REASONS = 8
MAX_SHOWN = 110
"""Characters of a value in a reason."""
ENDED_EARLY = "The code ended the program before its tests were done."


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value of a type that is not plain: equal to nothing."""

    type_name: str
    shown: str
    bases: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{self.shown} (a {self.type_name})"


@dataclass(frozen=True, slots=True, eq=False)
class Digest:
    """A value that was too large for the report: equal to what has the same digest."""

    value: str
    shown: str

    def __eq__(self, other: object) -> bool:
        return self.value == (other.value if isinstance(other, Digest) else digest(encode(other)))

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{self.shown}…"


class UnreadableReportError(Exception):
    """A report that is not what the testing program writes."""


@dataclass(slots=True)
class Verdict:
    """What a report says: the tests that ran, the reasons against the code, and how much was compared inside."""

    ran: int = 0
    reasons: list[str] = field(default_factory=list[str])
    failed_statements: list[str] = field(default_factory=list[str])
    compared: int = 0
    compared_inside: int = 0


def judge_report(report: str, nonce: str, tests: InstrumentedTests, control: tuple[str, str]) -> Verdict:
    """Return what a report proves. ``control`` are the name and the error of the test that must have failed."""
    try:
        return _Reader(tests, control).read(_parse_events(report, nonce))
    except (UnreadableReportError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        last = f" {error}" if isinstance(error, UnreadableReportError) else " Its report cannot be read."
        return Verdict(reasons=[ENDED_EARLY + last])


def _parse_events(report: str, nonce: str) -> list[list[Any]]:
    """Return the events of a report in their order. Raises ``UnreadableReportError``."""
    events: list[list[Any]] = [
        json.loads(line.removeprefix(nonce)) for line in report.split("\n") if line.startswith(nonce)
    ]
    if not events or events[-1][1:] != ["end"]:
        raise UnreadableReportError("Its report has no end.")
    if [event[0] for event in events] != list(range(len(events))) or any(e[1] == "end" for e in events[:-1]):
        raise UnreadableReportError("Something was added to its report or taken from it.")
    return [event[1:] for event in events[:-1]]


class _Reader:
    """Goes through the events of one report."""

    def __init__(self, tests: InstrumentedTests, control: tuple[str, str]) -> None:
        self._tests = tests
        self._control_name, self._control_error = control
        self._control_number = len(tests.assertions) - 1
        self._verdict = Verdict()
        self._seen_sealed: set[int] = set()
        self._test = ""
        self._has_failed = False
        """Whether the running test has failed already: what follows from that is not reported."""

    def read(self, events: Sequence[list[Any]]) -> Verdict:
        seen: collections.Counter[int] = collections.Counter()
        control = [False, False]
        for kind, *data in events:
            if kind == "test":
                self._test, self._has_failed = str(data[0]), False
                self._verdict.ran += self._test != self._control_name
            elif self._test == self._control_name:
                control[0] |= kind == "observed" and data[:2] == [self._control_number, False]
                control[1] |= kind == "error" and data[0] == f"AssertionError: {self._control_error}"
                if kind == "observed" and data[0] != self._control_number:
                    raise UnreadableReportError("Something was added to its report or taken from it.")
            elif kind == "observed":
                number, inside, values, times = data
                seen[number] += max(1, int(times))
                self._compare(self._tests.assertions[number], inside, values)
            elif kind == "skipped":
                self._verdict.ran -= 1
            elif kind in ("error", "failed"):
                text, line = data
                statement = self._tests.statements.get(line, "")
                where = statement or ("import" if kind == "failed" else self._test)
                self._fail(describe_error(where, str(text)), statement)
                if kind == "failed":
                    return self._verdict
        if not all(control):
            raise UnreadableReportError("A test that must fail did not.")
        if not self._verdict.reasons:
            self._find_missing(seen)
        return self._verdict

    def _find_missing(self, seen: collections.Counter[int]) -> None:
        for number, times in self._tests.required.items():
            if seen[number] < times:
                source = self._tests.assertions[number].source
                self._fail(
                    f"{source} was reached {seen[number]} of {times} times: something skipped or ended the tests."
                )
                return
        if not self._tests.required_sealed <= self._seen_sealed:
            self._fail("Not every case of the tests was compared: something skipped or ended the tests.")

    def _fail(self, reason: str, statement: str = "") -> None:
        if not self._has_failed and len(self._verdict.reasons) < MAX_REASONS:
            self._verdict.reasons.append(reason)
            if statement:
                self._verdict.failed_statements.append(statement)
        self._has_failed = True

    def _compare(self, assertion: Assertion, inside: bool | None, encoded: list[Any]) -> None:
        """Compare one observation with its expected value."""
        self._verdict.compared += 1
        if assertion.op == "raises":
            fault = _find_exception_fault(assertion, encoded, inside)
            is_strong = inside is None and 0 in assertion.operands
        else:
            values, is_known = self._operands(assertion, encoded)
            is_strong = is_known or (assertion.op == "truth" and assertion.is_direct and inside is None)
            if is_known or not _needs_sandbox(assertion.op, encoded):
                inside = None
            fault = _find_fault(assertion, values, inside)
        self._verdict.compared_inside += not is_strong
        if fault:
            note = f" ({assertion.message})" if assertion.message else ""
            self._fail(f"{assertion.source} failed: {fault}{note}", assertion.source)

    def _operands(self, assertion: Assertion, observed: list[Any]) -> tuple[list[object], bool]:
        """Return the operands of an assertion, and whether the judge itself knows one of those that are compared."""
        if len(observed) + len(assertion.operands) != assertion.arity:
            raise UnreadableReportError("Its report cannot be read.")
        rest = iter(observed)
        values: list[object] = []
        is_known = False
        for at in range(assertion.arity):
            if at in assertion.operands:
                values.append(assertion.operands[at])
                is_known |= at < 2
                continue
            data = next(rest)
            if isinstance(data, dict) and data["t"] == "sealed":  # pyright: ignore[reportUnknownMemberType]
                number: Any = data["v"]  # pyright: ignore[reportUnknownVariableType]
                if number not in assertion.sealed.get(at, ()):
                    # The code has given a placeholder as its own result.
                    raise UnreadableReportError("Its report names an expected value where none belongs.")
                self._seen_sealed.add(int(number))  # pyright: ignore[reportUnknownArgumentType]
                values.append(self._tests.sealed[number])
                is_known = True
            else:
                values.append(decode(data))
        return values, is_known


def decode(data: Any) -> object:
    """Return the value that :func:`octollm.services.arms.judge.testing_program.encode` wrote.

    Raises ``LookupError``, ``TypeError``, ``ValueError`` or ``ArithmeticError`` for anything else.
    """
    if isinstance(data, list):
        return [decode(each) for each in data]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(data, dict):
        return data
    return _DECODERS[data["t"]](data["v"])  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _decode_pairs(data: Any) -> dict[Any, object]:
    return {decode(key): decode(value) for key, value in data}


def _integer(data: Any) -> int:
    return data if isinstance(data, int) else int(data["v"], 16)


_DECODERS: dict[str, Callable[[Any], object]] = {
    "int": lambda v: int(v, 16),
    "float": float.fromhex,
    "tuple": lambda v: tuple(map(decode, v)),
    "dict": _decode_pairs,
    "set": lambda v: set(map(decode, v)),
    "frozenset": lambda v: frozenset(map(decode, v)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda v: complex(float.fromhex(v[0]), float.fromhex(v[1])),
    "range": lambda v: range(*map(_integer, v)),
    "ellipsis": lambda _: ...,
    "Counter": lambda v: collections.Counter(_decode_pairs(v)),  # pyright: ignore[reportArgumentType]
    "OrderedDict": lambda v: collections.OrderedDict(_decode_pairs(v)),
    "deque": lambda v: collections.deque(map(decode, v)),
    "Decimal": decimal.Decimal,
    "Fraction": lambda v: fractions.Fraction(int(v[0], 16), int(v[1], 16)),
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda v: datetime.timedelta(*v),
    "UUID": uuid.UUID,
    "Path": PurePosixPath,
    "opaque": lambda v: Opaque(v[0], v[1], tuple(v[2])),
    "digest": lambda v: Digest(v[0], v[1]),
}


def _needs_sandbox(op: str, observed: list[Any]) -> bool:
    """Return whether only the sandbox can tell if an assertion holds, since objects of the code are compared.

    An object is never compared with a plain value there: it would be the object that decides.
    """
    if op in ("in", "not in"):
        return has_opaque(observed[1])
    if op == "instance":
        return True
    return all(has_opaque(each) for each in observed[:2])


def _find_fault(assertion: Assertion, values: list[object], inside: bool | None) -> str:
    """Say what is wrong with the operands of an assertion, or return the empty string."""
    try:
        holds = inside if inside is not None else _holds(assertion.op, values)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "" if bool(holds) != assertion.is_negated else _describe(assertion, values)


def _holds(op: str, values: list[object]) -> bool:
    if op == "instance" and isinstance(values[0], Opaque):
        kinds: Any = values[1]
        return any(kind.__name__ in values[0].bases for kind in kinds)
    if op in ("is", "is not") and not any(value in (None, True, False, ...) for value in values if _is_simple(value)):
        # Of other values the report has copies.
        same = type(values[0]) is type(values[1]) and values[0] == values[1]
        return same if op == "is" else not same
    return bool(evaluate(op, values))


def _is_simple(value: object) -> bool:
    return value is None or isinstance(value, bool) or value is ...


def _describe(assertion: Assertion, values: list[object]) -> str:
    """Say what was expected and what was observed."""
    op, shown = assertion.op, [show(value) for value in values]
    is_negated = assertion.is_negated != (op in ("!=", "is not", "not in"))
    if op == "truth":
        return f"expected a {'false' if is_negated else 'true'} value, got {shown[0]}"
    if op == "instance":
        names = _type_names(values[1]) or shown[1]
        return f"expected {'no' if is_negated else 'an'} instance of {names}, got {shown[0]}"
    if op in ("in", "not in"):
        return f"expected {shown[0]} {'not ' if is_negated else ''}in {shown[1]}"
    if "," in op:
        parts = [shown[0], *(f"{part} {value}" for part, value in zip(op.split(","), shown[1:], strict=True))]
        return f"expected {'not ' if is_negated else ''}{' '.join(parts)}"
    # The constant is the expected value, and the second one where there are two or none.
    expected, got = (
        (shown[0], shown[1]) if 0 in assertion.operands and 1 not in assertion.operands else (shown[1], shown[0])
    )
    if op in ("<", "<=", ">", ">="):
        return f"expected {'not ' if is_negated else ''}{shown[0]} {op} {shown[1]}"
    if op in ("almost", "approx", "within", "within or at"):
        return f"expected {'anything but about' if is_negated else 'about'} {expected}, got {got}"
    if op == "same items":
        return f"expected the items {expected} in any order, got {got}"
    if is_negated:
        return f"expected anything but {expected}"
    if expected == got:
        expected, got = f"{expected} ({type(values[1]).__name__})", f"{got} ({type(values[0]).__name__})"
    return f"expected {expected}, got {got}"


def _type_names(kinds: Any) -> str:
    if not isinstance(kinds, tuple):
        return ""
    return " or ".join(str(kind.__name__) for kind in kinds)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType]


def show(value: object) -> str:
    """Show a value in a reason."""
    try:
        shown = repr(value)
    except ValueError:  # an integer of too many digits
        return "a very large number"
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


def _find_exception_fault(assertion: Assertion, observed: list[Any], inside: bool | None) -> str:
    """Say what is wrong with the exception of a ``with`` block, or return the empty string."""
    expected: Any = assertion.operands.get(0)
    names = " or ".join(expected) if expected else "an exception"
    if observed[0] != "raised":
        return f"expected {names}, nothing was raised"
    _, kind, bases, message = observed
    if expected and not any(name in bases for name in expected):
        return f"expected {names}, got {kind}: {str(message)[:150]}"
    pattern = assertion.operands.get(1)
    if inside is False:
        return f"the message does not match the expected pattern: {str(message)[:150]!r}"
    if isinstance(pattern, str) and re.search(pattern, str(message)) is None:
        return f"expected a message like {pattern!r}, got {str(message)[:150]!r}"
    return ""


def describe_error(where: str, error: str) -> str:
    """Say what failed: the statement of the tests, then what happened."""
    text = error.removeprefix("AssertionError: ")
    return f"{where} failed: {text}" if text != "AssertionError" else f"{where} is not so"
