"""Patterns of the input guardrail: personal data, secrets and prompt injection.

Each is a regular expression that hyperscan and :mod:`re` both compile, without nested repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PatternRisk = Literal["low", "medium", "high"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern with its risk. ``check`` confirms a match, such as by a check digit; ``description`` names it."""

    name: str
    risk: PatternRisk
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
