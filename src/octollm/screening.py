"""Screening of texts: patterns of personal data, secrets and prompt injection, and whether to allow or refuse a goal.

Text is never rewritten.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from octollm.contracts.screening import (
    MAX_FINDINGS,
    Risk,
    ScreeningFinding,
    ScreeningRecord,
    ScreeningResult,
    max_risk,
)
from octollm.contracts.task import Task


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern with its risk. ``check`` confirms a match, such as by a check digit; ``description`` names it.

    Hyperscan and :mod:`re` both compile the expression, so it has no nested repeats.
    """

    name: str
    risk: Literal["low", "medium", "high"]
    expression: str
    description: str
    check: Callable[[str], bool] | None = None

    @property
    def kind(self) -> str:
        """Return ``pii``, ``secret`` or ``injection``."""
        return self.name.partition(".")[0]


def _is_luhn_valid(text: str) -> bool:
    """Return whether the digits end with the check digit of a payment card (ISO/IEC 7812-1, annex B)."""
    digits = [int(char) for char in text if char.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = (2 * digit - 9 * (digit > 4) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban_valid(text: str) -> bool:
    """Return whether a text has the check digits of an IBAN (ISO 13616, ISO/IEC 7064 MOD 97-10)."""
    plain = text.replace(" ", "").upper()
    rotated = plain[4:] + plain[:4]
    if not 15 <= len(plain) <= 34 or not rotated.isalnum():
        return False
    return int("".join(str(int(char, 36)) for char in rotated)) % 97 == 1


def _is_phone_number(text: str) -> bool:
    return 8 <= sum(char.isdigit() for char in text) <= 15


# Gaps between words are bounded and end at a full stop or line break: separate sentences are no match together.
_OVERRIDE = (
    r"\b(?:ignore|disregard|forget|override|bypass|do not follow|don't follow)\b[^.\n]{0,40}"
    r"\b(?:all|any|the|your|my|these|those|previous|prior|above|earlier|preceding|system)\b[^.\n]{0,30}"
    r"\b(?:instructions?|rules?|prompts?|guidelines|directions|policies|constraints|restrictions)\b"
)
_REVEAL = (
    r"\b(?:reveal|print|show|repeat|output|leak|dump|display|give me|tell me)\b[^.\n]{0,40}"
    r"\b(?:system prompt|system message|hidden prompt|initial prompt|initial instructions|your instructions"
    r"|developer message|developer instructions)\b"
)
_ROLE = (
    r"\b(?:you are now|you're now|from now on|pretend to be|pretend you are|act as)\b[^.\n]{0,40}"
    r"\b(?:dan|jailbroken|unrestricted|unfiltered|uncensored|developer mode|god mode|no restrictions|no rules"
    r"|without restrictions|without any restrictions|without rules|without limits|without filters)\b"
)
_ESCAPE = (
    r"\b(?:disable|turn off|switch off|escape|break out of|bypass|circumvent|evade)\b[^.\n]{0,30}"
    r"\b(?:sandbox|guardrails?|safety (?:checks?|filters?|rules)|content filters?|moderation|seccomp|audit log)\b"
)
_EXFILTRATE = (
    r"\b(?:send|post|upload|exfiltrate|forward|transmit|curl|leak)\b[^.\n]{0,60}"
    r"\b(?:api[ _-]?keys?|secrets?|credentials?|passwords?|private keys?|environment variables|env vars|ssh keys?"
    r"|access tokens?)\b[^\n]{0,60}(?:https?://|ftp://|pastebin|webhook)"
)

PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        "pii.email",
        "low",
        r"(?<![\w.+-])[\w.+-]{1,64}@[a-z0-9-]{1,63}\.[a-z0-9.-]{1,120}[a-z]",
        "an email address",
    ),
    Pattern(
        "pii.phone",
        "low",
        r"(?<![\w.+/-])(?:\+[1-9][0-9 ()./-]{7,20}[0-9]|\([0-9]{3}\) ?[0-9]{3}-[0-9]{4})(?![\w])",
        "a phone number",
        _is_phone_number,
    ),
    Pattern(
        "pii.card", "medium", r"(?<![\w-])[0-9](?:[ -]?[0-9]){12,18}(?![\w-])", "a payment card number", _is_luhn_valid
    ),
    Pattern(
        "pii.iban",
        "medium",
        r"(?<![\w])[a-z]{2}[0-9]{2}(?: ?[a-z0-9]{4}){2,7}(?: ?[a-z0-9]{1,3})?(?![\w])",
        "an IBAN",
        _is_iban_valid,
    ),
    Pattern(
        "pii.us_ssn", "medium", r"(?<![\w-])[0-8][0-9]{2}-[0-9]{2}-[0-9]{4}(?![\w-])", "a US social security number"
    ),
    Pattern("secret.private_key", "medium", r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----", "a private key"),
    Pattern("secret.aws", "medium", r"(?<![\w])(?:AKIA|ASIA)[A-Z0-9]{16}(?![\w])", "an AWS access key"),
    Pattern(
        "secret.token",
        "medium",
        r"(?<![\w-])(?:ghp_[a-z0-9]{36}|github_pat_[a-z0-9_]{50,90}|sk-[a-z0-9_-]{32,200}|xox[abprs]-[a-z0-9-]{20,200}"
        r"|octo_[a-z0-9]{1,64}_[\w-]{20,80}|octojoin_[a-z0-9]{32}_[\w-]{43})",
        "an access token",
    ),
    Pattern(
        "secret.jwt", "medium", r"(?<![\w-])eyJ[\w-]{10,2000}\.eyJ[\w-]{10,8000}\.[\w-]{20,2000}", "a signed token"
    ),
    Pattern("injection.override", "medium", _OVERRIDE, "an order to ignore instructions"),
    Pattern("injection.reveal", "medium", _REVEAL, "an order to reveal the instructions of a model"),
    Pattern("injection.role", "medium", _ROLE, "an order to act without rules"),
    Pattern("injection.escape", "medium", _ESCAPE, "an order to get around a safeguard"),
    Pattern(
        "injection.template",
        "high",
        r"<\|(?:im_start|im_end|system|user|assistant|start_header_id|end_header_id|endoftext|eot_id)\|>"
        r"|\[/?INST\]|<</?SYS>>",
        "the control tokens of a chat template",
    ),
    Pattern("injection.exfiltrate", "high", _EXFILTRATE, "an order to send secrets to an address"),
)
"""All patterns. Their names are stable: metrics and the audit log carry them."""

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


def iter_task_texts(task: Task) -> Iterator[tuple[str, str, bool]]:
    """Yield the JSON Pointer of each text of a submission, the text, and whether it instructs a model."""
    yield "/goal", task.goal, True
    for name in ("constraints", "acceptance_criteria"):
        for number, text in enumerate(getattr(task, name)):
            yield f"/{name}/{number}", text, True
    yield "/context/text", task.context.text, True
    for number, file in enumerate(task.context.files):
        if file.text:
            yield f"/context/files/{number}/text", file.text, False
