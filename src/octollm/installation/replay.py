"""Replaying a recorded task: the code of today runs it again in this process, with the recorded model answers.

Nothing reaches the network: a replay has an installation of its own, without a provider or an allowed host.
Code runs in the sandbox again. Steps of arms that are no part of OctoLLM keep their recorded results.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, NoReturn

import msgspec
from sqlalchemy import update

from octollm.capability.inspection import read_chain
from octollm.client import AsyncClient, connect
from octollm.clock import Clock, IdGenerator
from octollm.config import Settings, read_settings
from octollm.contracts.auth import LOCAL_KEY_ID
from octollm.contracts.internal import ReserveRequest, ReserveResponse
from octollm.contracts.recording import RecordedFile, TaskRecording
from octollm.contracts.services import BUILT_IN_ARMS, SERVICES
from octollm.contracts.task import Usage
from octollm.errors import FieldError, OctoError, RemoteError
from octollm.events import EventLog
from octollm.installation.embedded import Installation, embedded_installation
from octollm.llm.selection import ModelChoice, resolve_embedding_model
from octollm.llm.types import ChatMessage, ChatRequest, ModelStreamChunk, bound_prompt_tokens
from octollm.resilience import Deadline
from octollm.rpc.service import Service, ServiceBase
from octollm.services.models.budget import BudgetClient
from octollm.services.models.model_loader import ModelLoader
from octollm.services.models.service import build_models
from octollm.services.orchestrator.accounts import LOCAL_TENANT
from octollm.storage import Transaction, open_database
from octollm.storage.migrations import database_url
from octollm.storage.tables import steps as step_table
from octollm.storage.tables import tasks
from octollm.tasks.attempts import AttemptReader
from octollm.tasks.changes import NewTask
from octollm.tasks.recording import RecordingReader
from octollm.tasks.replay import MAX_SHOWN, PLAN, Divergence, find_divergences
from octollm.tasks.store import TaskStore

REPLAY_SECONDS = 600.0
"""How long a replay may take: it waits for no model, but runs code."""
POLL_SECONDS = 0.1
_CONTEXT_TOKENS = 1_000_000
_LOCAL_SUB = "local-user"
_MODEL_ERRORS = frozenset(
    {
        "budget_exhausted",
        "context_too_long",
        "deadline_exceeded",
        "model_failed",
        "no_model",
        "overloaded",
        "quota_exhausted",
        "rate_limited",
        "unavailable",
    }
)
"""What a model call may have failed with. Only answers are recorded, so the attempt's error stands for it."""


_NULL = msgspec.Raw(b"null")


class ReplayReport(msgspec.Struct, frozen=True):
    """What a replay found. ``notes`` say what was not replayed, and why; ``answered`` counts the model calls."""

    task_id: str
    recorded_by: str
    replayed_by: str
    differences: tuple[Divergence, ...]
    notes: tuple[str, ...]
    answered: int


class _Request(NamedTuple):
    """A model request that the recording has no answer to."""

    step: str
    attempt: int


_unanswered: ContextVar[_Request | None] = ContextVar("unanswered", default=None)


@dataclass(slots=True)
class _RecordedModel:
    """The recorded answers in the place of a model."""

    recording: TaskRecording
    used: set[str] = field(default_factory=set[str])
    unknown: list[Divergence] = field(default_factory=list[Divergence])
    notes: dict[str, None] = field(default_factory=dict[str, None])
    context_tokens: int = _CONTEXT_TOKENS

    @property
    def name(self) -> str:
        """Return the name of the model that answered last."""
        return self.recording.model_calls[-1].model if self.recording.model_calls else "recorded"

    async def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Return an upper bound: no budget is spent."""
        return bound_prompt_tokens(messages)

    async def aclose(self) -> None:
        """Free nothing."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        """Refuse a request that the recording has no answer to."""
        asked = _unanswered.get() or _Request(PLAN, 0)
        self._refuse(asked, request)
        yield  # pyright: ignore[reportUnreachable]  it makes this a generator

    def _refuse(self, asked: _Request, request: ChatRequest) -> NoReturn:
        error = self._recorded_error(asked)
        if error is not None:
            note = f"{asked.step}: how the model failed is not recorded; the error of the attempt stands for it."
            self.notes[note] = None
            raise error
        prompt = " ".join(request.messages[-1].text.split())
        shown = prompt if len(prompt) <= MAX_SHOWN else f"{prompt[:MAX_SHOWN]}…"
        known = sum(call.step == asked.step for call in self.recording.model_calls)
        self.unknown.append(
            Divergence(
                "model_request",
                asked.step,
                asked.attempt,
                "request",
                f"{known} model requests with an answer, and this is none of them",
                shown,
            )
        )
        detail = "The recording has no answer to this request."
        raise RemoteError(detail, code="model_failed", status=502, retryable=False)

    def _recorded_error(self, asked: _Request) -> OctoError | None:
        recorded = self.recording
        if asked.step == PLAN:
            failure = recorded.error if recorded.plan is None else None
        else:
            attempts = (each for each in recorded.attempts if each.step == asked.step and each.attempt == asked.attempt)
            failure = next((each.outcome.error for each in attempts), None)
        if failure is None or failure.code not in _MODEL_ERRORS:
            return None
        return RemoteError(failure.detail, code=failure.code, status=502, retryable=False)

    def find_unused(self, not_replayed: Collection[str]) -> list[Divergence]:
        """Return the recorded requests that the replay did not make."""
        intervened = {each.step for each in self.recording.attempts if each.status in ("interrupted", "cancelled")}
        return [
            Divergence("model_request", call.step, 0, "request", "a model request, which was answered", "not made")
            for call in self.recording.model_calls
            if call.key not in self.used and call.step not in intervened | set(not_replayed)
        ]


class _RecordedBudget(BudgetClient):
    """Answers calls from the recording, as the journal does after a take-over, and reserves nothing."""

    def __init__(self, base: ServiceBase, model: _RecordedModel) -> None:
        super().__init__(base.client, base.identity.signer(), clock=base.clock, log=base.log)
        self._model = model
        self._answers = {call.key: call.answer for call in model.recording.model_calls}

    async def reserve(self, request: ReserveRequest, deadline: Deadline) -> ReserveResponse:
        """Return the recorded answer, or let the model refuse the request."""
        del deadline
        answer = self._answers.get(request.key)
        if answer is not None:
            self._model.used.add(request.key)
            return ReserveResponse("", 1, self._model.recording.task_id, msgspec.Raw(answer.encode()))
        claims = read_chain(request.bearer).links[-1]
        _unanswered.set(_Request(claims.step or PLAN, claims.attempt or 0))
        return ReserveResponse("", request.max_completion_tokens or 1, self._model.recording.task_id)

    def settle(self, reservation: str, usage: Usage, answer: msgspec.Raw = _NULL) -> asyncio.Task[None]:
        """Settle nothing."""
        del reservation, usage, answer
        return asyncio.create_task(asyncio.sleep(0), name="settle nothing")


@contextlib.asynccontextmanager
async def _recorded_models(model: _RecordedModel, base: ServiceBase, settings: Settings) -> AsyncGenerator[Service]:
    async def ready() -> _RecordedModel:
        return model

    loader = ModelLoader(lambda: ModelChoice(model.name, None, ready), clock=base.clock, log=base.log)
    embedding_model = resolve_embedding_model(settings.embedding_model, None, None)
    try:
        loader.start_loading()
        yield build_models(base, settings, loader, _RecordedBudget(base, model), embedding_model)
    finally:
        await loader.aclose()
        if embedding_model is not None:
            await embedding_model.aclose()


async def replay_recording(
    recording: TaskRecording, files: Sequence[RecordedFile], *, clock: Clock, ids: IdGenerator, version: str
) -> ReplayReport:
    """Run a recorded task again and return what was decided differently.

    Raises ``recording_invalid`` for one that cannot be replayed: a secret was masked in it, or an input is missing.
    """
    _check_replayable(recording, files)
    model = _RecordedModel(recording)
    with tempfile.TemporaryDirectory(prefix="octollm-replay-") as folder:
        settings = read_settings({"OCTOLLM_HOME": folder, "OCTOLLM_MODEL": recording.model}, tuple(SERVICES))
        async with (
            embedded_installation(
                settings,
                clock=clock,
                ids=ids,
                ports=dict.fromkeys(SERVICES, 0),
                overrides={"models": partial(_recorded_models, model)},
            ) as system,
            asyncio.timeout(REPLAY_SECONDS),
        ):
            await system.wait_ready()
            replay = _Replay(recording, files, clock, ids, version)
            replayed = await replay.run(system)
    requests = [*model.unknown, *model.find_unused(replay.kept)]
    return ReplayReport(
        recording.task_id,
        recording.octollm_version,
        version,
        find_divergences(recording, replayed, requests, replay.kept),
        (*replay.notes, *model.notes),
        len(model.used),
    )


def _check_replayable(recording: TaskRecording, files: Sequence[RecordedFile]) -> None:
    faults = [f"A secret was masked at {place}." for place in recording.masked]
    faults += [f"Not recorded: {what}." for what in recording.omitted]
    contents = {file.digest for file in files if not file.missing}
    reasons = {file.digest: file.missing for file in files}
    faults += [
        f"The file {file.name} is not in the recording: {reasons.get(file.digest or '', 'it was not recorded')}."
        for file in recording.contract.context.files
        if file.digest not in contents
    ]
    if faults:
        raise OctoError(
            f"The recording cannot be replayed. {faults[0]}",
            code="recording_invalid",
            field_errors=tuple(FieldError("/1", fault) for fault in faults[:20]),
        )


class _Replay:
    """One replay in a new installation."""

    def __init__(
        self, recording: TaskRecording, files: Sequence[RecordedFile], clock: Clock, ids: IdGenerator, version: str
    ) -> None:
        self._recording = recording
        self._files = files
        self._clock = clock
        self._ids = ids
        self._version = version
        self.notes: list[str] = []
        foreign = {arm.name for arm in recording.arms if arm.name not in BUILT_IN_ARMS}
        planned = () if recording.plan is None else recording.plan.steps
        self._keeps_plan = recording.plan is not None and bool(
            (foreign and recording.contract.assigned_arm is None)
            or any(step.arm not in BUILT_IN_ARMS for step in planned)
        )
        if self._keeps_plan:
            names = ", ".join(sorted(foreign | {step.arm for step in planned if step.arm not in BUILT_IN_ARMS}))
            self.notes.append(f"The plan is the recorded one: the planner could choose your own arms ({names}).")
        completed = {step.step for step in recording.steps if step.result is not None and step.status == "completed"}
        skipped = {step.step for step in recording.steps if step.status == "skipped"}
        forked = {each.step for each in recording.attempts if each.status == "reused"}
        self.kept = frozenset(
            {step.id for step in planned if step.arm not in BUILT_IN_ARMS and step.id in completed}
            | (forked & completed)
            | skipped
        )
        if forked or skipped:
            self._keeps_plan = True
        for name in sorted(self.kept):
            self.notes.append(f"Step {name} is not replayed; its result is the recorded one.")
        if recording.status == "cancelled":
            self.notes.append("The task was cancelled: only what came before is compared.")
        given = len(recording.instructions)
        if any(len(each.request.instructions) != given for each in recording.attempts):
            self.notes.append("Instructions were added while the task ran; the replay has them from its beginning.")

    async def run(self, system: Installation) -> TaskRecording:
        """Run the task to its end and return its recording."""
        async with (
            connect(system.gateway_url, system.local_key) as client,
            open_database(database_url(system.settings, "orchestrator"), clock=self._clock) as db,
        ):
            for file in self._files:
                if not file.missing:
                    await client.upload((file.name, file.read()))
            store = TaskStore(db, EventLog(db, self._clock, self._ids), self._clock)
            await self._store_task(store)
            await self._wait(client)
            reader = RecordingReader(
                db, store, AttemptReader(db), self._clock, version=self._version, model=self._recording.model
            )
            return await reader.read(self._recording.task_id, LOCAL_TENANT, ())

    async def _store_task(self, store: TaskStore) -> None:
        recording, now = self._recording, self._clock.now()
        seconds = recording.contract.budget.max_time_seconds or REPLAY_SECONDS
        new = NewTask(
            task_id=recording.task_id,
            tenant=LOCAL_TENANT,
            sub=_LOCAL_SUB,
            cred=LOCAL_KEY_ID,
            authority=recording.scopes,
            contract=recording.contract,
            correlation_id="",
            traceparent="",
            deadline_at=now + max(seconds, REPLAY_SECONDS),
            plan=recording.plan if self._keeps_plan else None,
        )

        async def write(tx: Transaction) -> None:
            given = [msgspec.to_builtins(each) for each in recording.instructions]
            if given:
                of_task = tasks.c.task_id == recording.task_id
                await tx.execute(update(tasks).where(of_task).values(instructions=given))
            await self._keep_results(tx, now)

        await store.create(new, write)

    async def _keep_results(self, tx: Transaction, now: float) -> None:
        specs = {} if self._recording.plan is None else {step.id: step for step in self._recording.plan.steps}
        for position, step in enumerate(self._recording.steps):
            if step.step in self.kept:
                await tx.execute(
                    tx.insert(step_table).values(
                        task_id=self._recording.task_id,
                        step=step.step,
                        position=position,
                        arm=step.arm,
                        title=specs[step.step].title,
                        status=step.status,
                        attempt=1,
                        spec=specs[step.step],
                        result=step.result,
                        created_at=now,
                        updated_at=now,
                        finished_at=now,
                    )
                )

    async def _wait(self, client: AsyncClient) -> None:
        """Wait for the end of the task, and decide its approvals as they were decided."""
        task = client.task(self._recording.task_id)
        decided = {each.approval_id: each for each in self._recording.approvals}
        while True:
            view = await task.read()
            if view.finished_at is not None:
                return
            for approval in view.approvals if view.status == "waiting" else ():
                if approval.status != "pending":
                    continue
                before = decided.get(approval.approval_id)
                if before is not None and before.status == "approved":
                    await task.approve(approval_id=approval.approval_id, goals=before.goals)
                else:
                    await task.reject(approval_id=approval.approval_id, comment="It was not approved.")
            await asyncio.sleep(POLL_SECONDS)
