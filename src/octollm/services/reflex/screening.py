"""Input guardrail: one pattern-matching pass over a submitted goal, and the decision to allow or refuse it. Text is never rewritten."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from octollm.contracts.public_api import SCREEN_TEXT
from octollm.contracts.screening import (
    MAX_FINDINGS,
    MAX_SCREENED,
    SCREENING_HEADER,
    PreprocessRequest,
    RejectedGoal,
    Risk,
    ScreeningFinding,
    ScreeningRecord,
    ScreeningResult,
    max_risk,
)
from octollm.contracts.task import Task
from octollm.errors import FieldError, OctoError
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.services.reflex.patterns import PATTERNS, Pattern
from octollm.services.reflex.upstream import Upstream, UpstreamRequest
from octollm.telemetry import Metrics

_BOUNDS = re.compile(r"\{([0-9]+),[0-9]+\}")
INJECTION_KINDS_REFUSED = 2
"""So many kinds of injection in one text are no accident."""


class Screener:
    """Looks for :data:`PATTERNS`. Hyperscan says in one pass which may be there; only these are looked for exactly.

    It is not built for every machine: without it each pattern is looked for in turn, which finds the same.
    """

    def __init__(self, patterns: Iterable[Pattern] = PATTERNS) -> None:
        self._patterns = tuple(patterns)
        self._exact = [re.compile(each.expression, re.IGNORECASE | re.ASCII) for each in self._patterns]
        self._database = _compile_database([_drop_upper_bounds(each.expression) for each in self._patterns])

    def screen(self, text: str) -> ScreeningResult:
        """Return what is in ``text`` and whether work on it is refused.

        Refused is what a single pattern of high risk was found in, or several kinds of injection.
        """
        plain, places = _normalize(text)
        findings: list[ScreeningFinding] = []
        kinds: set[str] = set()
        for number in self._prefilter(plain):
            pattern = self._patterns[number]
            for match in self._exact[number].finditer(plain):
                if pattern.check is not None and not pattern.check(match[0]):
                    continue
                kinds.add(pattern.name)
                if len(findings) < MAX_FINDINGS:
                    findings.append(_build_finding(pattern, match, places))
        findings.sort(key=lambda each: (each.start, each.end))
        return self._decide(findings, kinds)

    def _prefilter(self, plain: str) -> list[int]:
        """Return the patterns that may be found, in their order."""
        if self._database is None:
            return list(range(len(self._patterns)))
        found: set[int] = set()

        def seen(number: int, _start: int, _end: int, _flags: int, _context: object) -> None:
            found.add(number)

        self._database.scan(plain.encode(), match_event_handler=seen)
        return sorted(found)

    def _decide(self, findings: list[ScreeningFinding], kinds: set[str]) -> ScreeningResult:
        found = [each for each in self._patterns if each.name in kinds]
        injections = [each for each in found if each.kind == "injection"]
        high = [each for each in found if each.risk == "high"]
        refused = high or (injections if len(injections) >= INJECTION_KINDS_REFUSED else [])
        risks: list[Risk] = [each.risk for each in found]
        risk = max_risk("high" if refused else "none", *risks)
        if not refused:
            return ScreeningResult("allow", risk, findings=tuple(findings))
        reason = f"The text has {' and '.join(each.description for each in refused)}."
        return ScreeningResult("refuse", risk, reason, tuple(findings))


def summarize_screening(screening: ScreeningResult) -> ScreeningRecord:
    """Return what is recorded of a screening."""
    return ScreeningRecord(screening.risk, dict(Counter(each.pattern for each in screening.findings)))


def _compile_database(expressions: list[bytes]) -> Any:
    """Return all expressions compiled for one pass, or ``None`` where hyperscan is not."""
    try:
        import hyperscan  # noqa: PLC0415  it is not there on every machine
    except ImportError:
        return None
    flags = hyperscan.HS_FLAG_CASELESS | hyperscan.HS_FLAG_SINGLEMATCH | hyperscan.HS_FLAG_PREFILTER
    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    database.compile(expressions=expressions, ids=list(range(len(expressions))), flags=[flags] * len(expressions))
    return database


def _drop_upper_bounds(expression: str) -> bytes:
    """Return an expression without upper bounds of repeats: it matches no less, and is compiled in no time."""
    return _BOUNDS.sub(lambda bounds: "*" if bounds[1] == "0" else "+", expression).encode()


def _build_finding(pattern: Pattern, match: re.Match[str], places: list[int] | None) -> ScreeningFinding:
    start, end = match.span()
    if places is not None:
        start, end = places[start], places[end - 1] + 1
    return ScreeningFinding(pattern.name, pattern.risk, start, end)


def _normalize(text: str) -> tuple[str, list[int] | None]:
    """Return ``text`` as it reads, and where each character of that stands in ``text``.

    Compatibility forms are unified (NFKC) and what is not seen is left out, so that neither hides a word.
    """
    if text.isascii():
        return text, None
    plain: list[str] = []
    places: list[int] = []
    for place, char in enumerate(text):
        if unicodedata.category(char) == "Cf":
            continue
        for each in unicodedata.normalize("NFKC", char):
            plain.append(each)
            places.append(place)
    return "".join(plain), places


GuardrailMode = Literal["block", "log", "off"]


class InputGuardrail:
    """Screens submissions before they are passed on, as they came. It never changes a goal or a file."""

    def __init__(self, screener: Screener, mode: GuardrailMode, upstream: Upstream, metrics: Metrics) -> None:
        """``mode`` says what becomes of a goal of high risk; with ``off`` nothing is looked at."""
        self._screener = screener
        self._mode = mode
        self._upstream = upstream
        self._metrics = metrics

    async def check(self, call: IncomingCall) -> dict[str, str]:
        """Return the headers with which a submission is passed on; raise ``goal_refused`` and have that recorded."""
        if self._mode == "off":
            return {}
        try:
            contract = msgspec.json.decode(call.body, type=Task)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return {}  # the orchestrator says what is wrong with it
        found: Counter[str] = Counter()
        worst: Risk = "none"
        for pointer, text, orders in _iter_texts(contract):
            screening = self._screener.screen(text[:MAX_SCREENED])
            note = summarize_screening(screening)
            found.update(note.found)
            # A file is what the work is about: what stands in it is no order to anybody, and is recorded only.
            risk: Risk = screening.risk if orders or screening.risk != "high" else "medium"
            worst = max_risk(worst, risk)
            if orders and screening.decision == "refuse" and self._mode == "block":
                await self._refuse(call, pointer, screening)
        for pattern in found:
            self._metrics.screening_findings.labels(pattern).inc()
        if not found:
            return {}
        return {SCREENING_HEADER: msgspec.json.encode(ScreeningRecord(worst, dict(found))).decode()}

    async def _refuse(self, call: IncomingCall, pointer: str, screening: ScreeningResult) -> None:
        self._metrics.rejected_requests.labels("goal_refused").inc()
        asked = UpstreamRequest(
            "screenings.record",
            "POST",
            "/screenings",
            body=msgspec.json.encode(RejectedGoal(summarize_screening(screening), screening.reason)),
        )
        await self._upstream.send(call.bearer, asked, call.deadline)
        raise OctoError(
            f"{screening.reason} `POST /preprocess` shows where; OCTOLLM_INPUT_GUARDRAIL says what is refused.",
            code="goal_refused",
            field_errors=(FieldError(pointer, screening.reason),),
        )

    async def preprocess(self, _call: IncomingCall, body: PreprocessRequest) -> ScreeningResult:
        """Return the decision on a text alone. Nothing is kept, and nothing is done."""
        return self._screener.screen(body.text)

    def operations(self) -> list[Operation]:
        """Return the operation that shows a decision."""
        return [implement(SCREEN_TEXT, self.preprocess, auth="door")]


def _iter_texts(contract: Task) -> Iterator[tuple[str, str, bool]]:
    """Yield each text of a submission: its place, and whether it gives orders."""
    yield "/goal", contract.goal, True
    for name in ("constraints", "acceptance_criteria"):
        for number, text in enumerate(getattr(contract, name)):
            yield f"/{name}/{number}", text, True
    yield "/context/text", contract.context.text, True
    for number, file in enumerate(contract.context.files):
        if file.text:
            yield f"/context/files/{number}/text", file.text, False
