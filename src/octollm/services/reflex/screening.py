"""Input guardrail: what clients submit is screened before it is forwarded, and refused or recorded. Never rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, cast

import msgspec

from octollm.contracts.internal_operations import RECORD_REFUSAL
from octollm.contracts.public_api import SCREEN_TEXT
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
from octollm.contracts.task import Task
from octollm.errors import FieldError, OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.screening import Screener, iter_task_texts, summarize_screening
from octollm.services.reflex.upstream import Upstream, UpstreamRequest
from octollm.telemetry import Metrics

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
        for pointer, text, is_instruction in iter_task_texts(task):
            screening = self._screener.screen(text[:MAX_SCREENED])
            matches.update(summarize_screening(screening).found)
            # A file is material for the work, not an instruction: its findings are recorded and refuse nothing.
            risk: Risk = screening.risk if is_instruction or screening.risk != "high" else "medium"
            worst = max_risk(worst, risk)
            if is_instruction and screening.decision == "refuse" and self._mode == "block":
                await self._refuse(call.bearer, call.deadline, pointer, screening)
        for pattern in matches:
            self._metrics.screening_findings.labels(pattern).inc()
        if not matches:
            return {}
        return {SCREENING_HEADER: msgspec.json.encode(ScreeningRecord(worst, dict(matches))).decode()}

    async def check_instruction(self, credential: str, text: str, deadline: Deadline) -> None:
        """Refuse an instruction to a running task as :meth:`check` refuses a goal."""
        if self._mode == "off":
            return
        screening = self._screener.screen(text[:MAX_SCREENED])
        for pattern in summarize_screening(screening).found:
            self._metrics.screening_findings.labels(pattern).inc()
        if screening.decision == "refuse" and self._mode == "block":
            await self._refuse(credential, deadline, "/text", screening)

    def check_payload(self, body: bytes) -> tuple[ScreeningRecord | None, str]:
        """Return the record of the texts of a webhook's payload, and why they are refused; empty if they are not."""
        if self._mode == "off":
            return None, ""
        try:
            texts = "\n".join(_iter_strings(msgspec.json.decode(body)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None, ""  # The orchestrator refuses what is not JSON.
        screening = self._screener.screen(texts[:MAX_SCREENED])
        record = summarize_screening(screening)
        for pattern in record.found:
            self._metrics.screening_findings.labels(pattern).inc()
        is_refused = screening.decision == "refuse" and self._mode == "block"
        return record if record.found else None, screening.reason if is_refused else ""

    async def _refuse(self, credential: str, deadline: Deadline, pointer: str, screening: ScreeningResult) -> None:
        self._metrics.rejected_requests.labels("goal_refused").inc()
        request = UpstreamRequest(
            RECORD_REFUSAL.id,
            RECORD_REFUSAL.method,
            RECORD_REFUSAL.path,
            RECORD_REFUSAL.kind,
            msgspec.json.encode(RejectedGoal(summarize_screening(screening), screening.reason)),
        )
        await self._upstream.send(credential, request, deadline)
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
        return [implement(SCREEN_TEXT, self.preprocess, auth="gateway")]


def _iter_strings(payload: object) -> Iterator[str]:
    """Yield the strings of a JSON document: keys and values."""
    waiting: list[object] = [payload]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            members = cast("dict[object, object]", value)
            waiting += [*members.keys(), *members.values()]
        elif isinstance(value, list):
            waiting += cast("list[object]", value)
