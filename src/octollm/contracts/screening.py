"""The input guardrail's contract: what is found in a text, and the decision on it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from octollm.contracts.task import Count

MAX_SCREENED = 262_144
"""Characters of a text that is sent to be screened alone."""
MAX_FINDINGS = 100
"""Findings that are told; more than these change nothing."""
SCREENING_HEADER = "X-Screening"


Risk = Literal["none", "low", "medium", "high"]
"""How much a text as a whole is to be minded, in rising order."""


_RISK_ORDER: tuple[Risk, ...] = get_args(Risk)


def max_risk(*risks: Risk) -> Risk:
    """Return the highest of ``risks``; ``none`` of none."""
    return _RISK_ORDER[max((_RISK_ORDER.index(risk) for risk in risks), default=0)]


class PreprocessRequest(msgspec.Struct, frozen=True):
    """A text to be screened. Nothing of it is kept."""

    text: Annotated[str, Meta(max_length=MAX_SCREENED)]


class ScreeningFinding(msgspec.Struct, frozen=True):
    """Something that was found: code points ``start`` to ``end`` of the text. What stands there is not repeated."""

    pattern: str
    risk: Literal["low", "medium", "high"]
    start: Count
    end: Count


class ScreeningResult(msgspec.Struct, frozen=True):
    """The door's decision on a text. ``reason`` says in words why it is refused."""

    decision: Literal["allow", "refuse"]
    risk: Risk
    reason: str = ""
    findings: Annotated[tuple[ScreeningFinding, ...], Meta(max_length=MAX_FINDINGS)] = ()


class ScreeningRecord(msgspec.Struct, frozen=True):
    """What is recorded of a screening: how often each pattern was found, and never what."""

    risk: Risk
    found: Annotated[dict[Annotated[str, Meta(max_length=64)], Count], Meta(max_length=64)] = {}


class RejectedGoal(msgspec.Struct, frozen=True):
    """A goal that the door refused, for the audit log."""

    note: ScreeningRecord
    reason: Annotated[str, Meta(max_length=1000)]
