"""Recordings of tasks from the database, without credentials and with every recognisable secret masked."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import func, select

from octollm.clock import Clock, format_rfc3339
from octollm.contracts.attempts import AttemptQuery, AttemptView
from octollm.contracts.recording import MAX_RECORDED_BYTES, RecordedModelCall, RecordedStep, TaskRecording
from octollm.contracts.task import ArmInfo
from octollm.errors import OctoError
from octollm.masking import mask_text
from octollm.storage import Database
from octollm.storage.tables import model_journal
from octollm.tasks.attempts import AttemptReader, excerpt
from octollm.tasks.state import is_final
from octollm.tasks.store import TaskStore

MAX_ATTEMPTS = 1000
"""Attempts in one recording."""
MAX_MODEL_CALLS = 5000
"""Model calls in one recording."""
MAX_MASKED = 100
"""Places of masked secrets that a recording names."""


class RecordingReader:
    """Reads what a task that has ended was given, did, and was answered by models."""

    def __init__(
        self, db: Database, store: TaskStore, attempts: AttemptReader, clock: Clock, *, version: str, model: str
    ) -> None:
        """``version`` is that of this program, and ``model`` the installation's setting."""
        self._db = db
        self._store = store
        self._attempts = attempts
        self._clock = clock
        self._version = version
        self._model = model

    async def read(self, task_id: str, tenant: str, arms: Sequence[ArmInfo]) -> TaskRecording:
        """Return the recording of a task; ``arms`` are those of its tenant.

        Raises ``task_not_found``, also for another tenant's, and ``state_conflict`` while it goes on.
        """
        view = await self._store.view(task_id, tenant)
        if not is_final(view.status):
            raise OctoError(f"The task is {view.status}; it has to end first.", code="state_conflict")
        task = await self._store.get(task_id)
        omitted: list[str] = []
        recording = TaskRecording(
            task_id,
            view.status,
            task.contract,
            self._version,
            format_rfc3339(self._clock.now()),
            model=self._model,
            scopes=task.authority,
            plan=task.plan,
            replanned=await self._store.was_replanned(task_id),
            output=excerpt(view.output) if view.status == "completed" else None,
            artifacts=view.artifacts,
            error=view.error,
            approvals=view.approvals,
            instructions=view.instructions,
            arms=tuple(arms),
            steps=await self._read_steps(task_id, omitted),
            attempts=await self._read_attempts(task_id, omitted),
            model_calls=await self._read_model_calls(task_id, omitted),
        )
        return _mask(msgspec.structs.replace(recording, omitted=tuple(omitted)))

    async def _read_steps(self, task_id: str, omitted: list[str]) -> tuple[RecordedStep, ...]:
        found: list[RecordedStep] = []
        room = MAX_RECORDED_BYTES
        for step in await self._store.steps(task_id):
            result = step.result
            room -= 0 if result is None else len(msgspec.json.encode(result))
            if room < 0 and result is not None:
                omitted.append(f"the result of step {step.step}, past the bound of {MAX_RECORDED_BYTES:,} bytes")
                result = None
            found.append(RecordedStep(step.step, step.arm, step.status, result))
        return tuple(found)

    async def _read_attempts(self, task_id: str, omitted: list[str]) -> tuple[AttemptView, ...]:
        found: list[AttemptView] = []
        cursor = ""
        while len(found) < MAX_ATTEMPTS:
            page = await self._attempts.list(task_id, AttemptQuery(limit=200, cursor=cursor))
            found += page.attempts
            cursor = page.cursor or ""
            if not cursor:
                return tuple(found)
        omitted.append(f"the attempts after the first {MAX_ATTEMPTS:,}")
        return tuple(found[:MAX_ATTEMPTS])

    async def _read_model_calls(self, task_id: str, omitted: list[str]) -> tuple[RecordedModelCall, ...]:
        of_task = model_journal.c.task_id == task_id
        order = model_journal.c.created_at, model_journal.c.key
        async with self._db.read() as conn:
            count = int(await conn.scalar(select(func.count()).select_from(model_journal).where(of_task)) or 0)
            columns = model_journal.c.key, model_journal.c.step, model_journal.c.model, model_journal.c.answer
            rows = await conn.all(select(*columns).where(of_task).order_by(*order).limit(MAX_MODEL_CALLS))
        found: list[RecordedModelCall] = []
        room = MAX_RECORDED_BYTES
        for row in rows:
            room -= len(row["answer"])
            if room < 0:
                break
            # The key as the caller gave it: the journal's has the task in front.
            key = str(row["key"]).removeprefix(f"{task_id}:")
            found.append(RecordedModelCall(key, row["step"], row["model"], bytes(row["answer"]).decode()))
        if len(found) < count:
            omitted.append(f"{count - len(found):,} of {count:,} model answers, past the bound of the recording")
        return tuple(found)


def _mask(recording: TaskRecording) -> TaskRecording:
    """Return a recording without secrets, which names the places where it had some."""
    places: list[str] = []

    def masked(value: object, pointer: str) -> object:
        if isinstance(value, str):
            text = mask_text(value)
            if text != value:
                places.append(pointer)
            return text
        if isinstance(value, dict):
            members: dict[str, object] = value  # pyright: ignore[reportUnknownVariableType]
            # A name may be a text of the task, too, such as the id of a step.
            return {mask_text(name): masked(item, f"{pointer}/{mask_text(name)}") for name, item in members.items()}
        if isinstance(value, list | tuple):
            items: list[object] = list(value)  # pyright: ignore[reportUnknownArgumentType] pyright: ignore[reportUnknownVariableType]
            return [masked(item, f"{pointer}/{index}") for index, item in enumerate(items)]
        return value

    def masked_answer(call: RecordedModelCall, index: int) -> RecordedModelCall:
        before = len(places)
        answer = masked(msgspec.json.decode(call.answer), f"/model_calls/{index}/answer")
        # Its own bytes unless something was masked.
        if len(places) == before:
            return call
        return msgspec.structs.replace(call, answer=msgspec.json.encode(answer).decode())

    calls = tuple(masked_answer(call, index) for index, call in enumerate(recording.model_calls))
    bare = msgspec.structs.replace(recording, model_calls=())
    clean = msgspec.convert(masked(msgspec.to_builtins(bare), ""), TaskRecording)
    return msgspec.structs.replace(clean, model_calls=calls, masked=tuple(sorted(places)[:MAX_MASKED]))
