"""Input guardrail: pattern matching over a submitted goal, and the decision to allow or refuse it.

Text is never rewritten.
"""

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
"""A text with this many kinds of injection is refused, whatever the risk of each."""


class Screener:
    """Finds :data:`PATTERNS` in a text.

    Hyperscan prefilters: one pass tells which patterns may match, and :mod:`re` runs only those. It is not available
    on every machine; without it :mod:`re` runs every pattern, with the same result.
    """

    def __init__(self, patterns: Iterable[Pattern] = PATTERNS) -> None:
        self._patterns = tuple(patterns)
        self._exact = [re.compile(each.expression, re.IGNORECASE | re.ASCII) for each in self._patterns]
        self._database = _compile_database([_drop_upper_bounds(each.expression) for each in self._patterns])

    def screen(self, text: str) -> ScreeningResult:
        """Return the findings in ``text`` and the decision.

        A text is refused for one pattern of high risk, or for several kinds of injection.
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
                # The list is bounded and the decision is not: kinds past the bound of the list count too.
                if len(findings) < MAX_FINDINGS:
                    findings.append(_build_finding(pattern, match, places))
        findings.sort(key=lambda each: (each.start, each.end))
        return self._decide(findings, kinds)

    def _prefilter(self, plain: str) -> list[int]:
        """Return the indices of the patterns that may match, in order."""
        if self._database is None:
            return list(range(len(self._patterns)))
        candidates: set[int] = set()

        def add_candidate(number: int, _start: int, _end: int, _flags: int, _context: object) -> None:
            candidates.add(number)

        self._database.scan(plain.encode(), match_event_handler=add_candidate)
        return sorted(candidates)

    def _decide(self, findings: list[ScreeningFinding], kinds: set[str]) -> ScreeningResult:
        matched = [each for each in self._patterns if each.name in kinds]
        injections = [each for each in matched if each.kind == "injection"]
        high = [each for each in matched if each.risk == "high"]
        refused = high or (injections if len(injections) >= INJECTION_KINDS_REFUSED else [])
        risks: list[Risk] = [each.risk for each in matched]
        risk = max_risk("high" if refused else "none", *risks)
        if not refused:
            return ScreeningResult("allow", risk, findings=tuple(findings))
        reason = f"The text has {' and '.join(each.description for each in refused)}."
        return ScreeningResult("refuse", risk, reason, tuple(findings))


def summarize_screening(screening: ScreeningResult) -> ScreeningRecord:
    """Return the record of a screening: its risk, and how often each pattern matched."""
    return ScreeningRecord(screening.risk, dict(Counter(each.pattern for each in screening.findings)))


def _compile_database(expressions: list[bytes]) -> Any:
    """Return all expressions compiled for one pass; ``None`` without hyperscan."""
    try:
        import hyperscan  # noqa: PLC0415  It is not available on every machine.
    except ImportError:
        return None
    flags = hyperscan.HS_FLAG_CASELESS | hyperscan.HS_FLAG_SINGLEMATCH | hyperscan.HS_FLAG_PREFILTER
    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    database.compile(expressions=expressions, ids=list(range(len(expressions))), flags=[flags] * len(expressions))
    return database


def _drop_upper_bounds(expression: str) -> bytes:
    """Return an expression without upper bounds of repeats: it matches no less, and compiles much faster."""
    return _BOUNDS.sub(lambda bounds: "*" if bounds[1] == "0" else "+", expression).encode()


def _build_finding(pattern: Pattern, match: re.Match[str], places: list[int] | None) -> ScreeningFinding:
    start, end = match.span()
    if places is not None:
        start, end = places[start], places[end - 1] + 1
    return ScreeningFinding(pattern.name, pattern.risk, start, end)


def _normalize(text: str) -> tuple[str, list[int] | None]:
    """Return ``text`` as it reads, and the index in ``text`` of each of its characters.

    Compatibility forms are unified (NFKC) and invisible characters dropped, so that neither hides a word.
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
    """Screens submissions before they are forwarded. It never changes a goal or a file."""

    def __init__(self, screener: Screener, mode: GuardrailMode, upstream: Upstream, metrics: Metrics) -> None:
        """With ``mode`` ``log`` findings are only recorded; with ``off`` nothing is screened."""
        self._screener = screener
        self._mode = mode
        self._upstream = upstream
        self._metrics = metrics

    async def check(self, call: IncomingCall) -> dict[str, str]:
        """Return the headers to forward with a submission. Raises ``goal_refused``, after recording the refusal."""
        if self._mode == "off":
            return {}
        try:
            task = msgspec.json.decode(call.body, type=Task)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return {}  # The orchestrator validates the body and reports its faults.
        matches: Counter[str] = Counter()
        worst: Risk = "none"
        for pointer, text, is_instruction in _iter_texts(task):
            screening = self._screener.screen(text[:MAX_SCREENED])
            matches.update(summarize_screening(screening).found)
            # A file is material for the work, not an instruction: its findings are recorded and refuse nothing.
            risk: Risk = screening.risk if is_instruction or screening.risk != "high" else "medium"
            worst = max_risk(worst, risk)
            if is_instruction and screening.decision == "refuse" and self._mode == "block":
                await self._refuse(call, pointer, screening)
        for pattern in matches:
            self._metrics.screening_findings.labels(pattern).inc()
        if not matches:
            return {}
        return {SCREENING_HEADER: msgspec.json.encode(ScreeningRecord(worst, dict(matches))).decode()}

    async def _refuse(self, call: IncomingCall, pointer: str, screening: ScreeningResult) -> None:
        self._metrics.rejected_requests.labels("goal_refused").inc()
        request = UpstreamRequest(
            "screenings.record",
            "POST",
            "/screenings",
            body=msgspec.json.encode(RejectedGoal(summarize_screening(screening), screening.reason)),
        )
        await self._upstream.send(call.bearer, request, call.deadline)
        raise OctoError(
            f"{screening.reason} `POST /preprocess` shows where; OCTOLLM_INPUT_GUARDRAIL sets what is refused.",
            code="goal_refused",
            field_errors=(FieldError(pointer, screening.reason),),
        )

    async def preprocess(self, _call: IncomingCall, body: PreprocessRequest) -> ScreeningResult:
        """Return the decision on a text. Nothing is stored."""
        return self._screener.screen(body.text)

    def operations(self) -> list[Operation]:
        """Return the operation that screens a text."""
        return [implement(SCREEN_TEXT, self.preprocess, auth="door")]


def _iter_texts(task: Task) -> Iterator[tuple[str, str, bool]]:
    """Yield the JSON Pointer of each text of a submission, the text, and whether it instructs a model."""
    yield "/goal", task.goal, True
    for name in ("constraints", "acceptance_criteria"):
        for number, text in enumerate(getattr(task, name)):
            yield f"/{name}/{number}", text, True
    yield "/context/text", task.context.text, True
    for number, file in enumerate(task.context.files):
        if file.text:
            yield f"/context/files/{number}/text", file.text, False
