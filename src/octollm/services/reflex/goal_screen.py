"""The door's look at what is submitted: goals of high risk are refused, everything that is found is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import msgspec

from octollm.contracts.screening import (
    MAX_SCREENED,
    SCREENING_HEADER,
    PreprocessRequest,
    RejectedGoal,
    Risk,
    ScreeningRecord,
    ScreeningResult,
    max_risk,
)
from octollm.contracts.task import TaskContract
from octollm.errors import FieldError, OctoError
from octollm.rpc.call import IncomingCall, Operation
from octollm.services.reflex.screening import Screener, summarize_screening
from octollm.services.reflex.upstream import Upstream, UpstreamRequest
from octollm.telemetry import Metrics

GuardrailMode = Literal["refuse", "record", "off"]


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
            contract = msgspec.json.decode(call.body, type=TaskContract)
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
            if orders and screening.decision == "refuse" and self._mode == "refuse":
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
            f"{screening.reason} `POST /preprocess` shows where; OCTOLLM_SCREENING says what is refused.",
            code="goal_refused",
            field_errors=(FieldError(pointer, screening.reason),),
        )

    async def preprocess(self, _call: IncomingCall, body: PreprocessRequest) -> ScreeningResult:
        """Return the decision on a text alone. Nothing is kept, and nothing is done."""
        return self._screener.screen(body.text)

    def operations(self) -> list[Operation]:
        """Return the operation that shows a decision."""
        return [
            Operation(
                "preprocess",
                "POST",
                "/preprocess",
                self.preprocess,
                auth="door",
                body=PreprocessRequest,
                response=ScreeningResult,
                strict=True,
                max_body=4 * MAX_SCREENED,
                summary="Show what the door finds in a text, and whether it would refuse it as a goal.",
            )
        ]


def _iter_texts(contract: TaskContract) -> Iterator[tuple[str, str, bool]]:
    """Yield each text of a submission: its place, and whether it gives orders."""
    yield "/goal", contract.goal, True
    for name in ("constraints", "acceptance_criteria"):
        for number, text in enumerate(getattr(contract, name)):
            yield f"/{name}/{number}", text, True
    yield "/context/text", contract.context.text, True
    for number, file in enumerate(contract.context.files):
        if file.text:
            yield f"/context/files/{number}/text", file.text, False
