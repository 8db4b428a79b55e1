"""Messages of the input guardrail: the findings in a text, and the decision on it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from octollm.contracts.task import Count

MAX_SCREENED = 262_144
"""Characters of a text that are screened."""
MAX_FINDINGS = 100
"""Findings of one result. Further ones count for the decision only."""
SCREENING_HEADER = "X-Screening"
"""Carries the :class:`ScreeningRecord` of a submission from the gateway to the orchestrator."""

Risk = Literal["none", "low", "medium", "high"]
"""The risk of a text as a whole, in rising order."""
_RISK_ORDER: tuple[Risk, ...] = get_args(Risk)


def max_risk(*risks: Risk) -> Risk:
    """Return the highest of ``risks``; ``none`` without any."""
    return _RISK_ORDER[max((_RISK_ORDER.index(risk) for risk in risks), default=0)]


class PreprocessRequest(msgspec.Struct, frozen=True):
    """A text to screen. It is not stored."""

    text: Annotated[str, Meta(max_length=MAX_SCREENED)]


class ScreeningFinding(msgspec.Struct, frozen=True):
    """A match of a pattern: code points ``start`` to ``end`` of the text. The matched text itself is left out."""

    pattern: str
    risk: Literal["low", "medium", "high"]
    start: Count
    end: Count


class ScreeningResult(msgspec.Struct, frozen=True):
    """The gateway's decision on a text. ``reason`` says why it is refused."""

    decision: Literal["allow", "refuse"]
    risk: Risk
    reason: str = ""
    findings: Annotated[tuple[ScreeningFinding, ...], Meta(max_length=MAX_FINDINGS)] = ()


class ScreeningRecord(msgspec.Struct, frozen=True):
    """What is recorded of a screening: how often each pattern matched, and never the matched text."""

    risk: Risk
    found: Annotated[dict[Annotated[str, Meta(max_length=64)], Count], Meta(max_length=64)] = {}


class RejectedGoal(msgspec.Struct, frozen=True):
    """A goal that the gateway refused, for the audit log."""

    note: ScreeningRecord
    reason: Annotated[str, Meta(max_length=1000)]
