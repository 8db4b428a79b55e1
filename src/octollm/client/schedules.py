"""AsyncSchedules: tasks that are submitted again and again, at the times of a cron expression."""

from __future__ import annotations

from collections.abc import Iterable

from octollm.client._transport import GatewayTransport
from octollm.contracts.api import TaskView
from octollm.contracts.operations import StoredFile
from octollm.contracts.schedules import (
    CREATE_SCHEDULE,
    DELETE_SCHEDULE,
    LIST_SCHEDULES,
    PAUSE_SCHEDULE,
    READ_SCHEDULE,
    RESUME_SCHEDULE,
    RUN_SCHEDULE,
    CatchUp,
    Overlap,
    ScheduleRequest,
    ScheduleView,
)
from octollm.contracts.task import Budget, FileRef, TaskContext


class AsyncSchedules:
    """The tenant's schedules, as ``client.schedules``. Every method raises :class:`~octollm.client.APIError`."""

    def __init__(self, transport: GatewayTransport) -> None:
        self._transport = transport

    async def create(
        self,
        cron: str,
        goal: str,
        *,
        time_zone: str = "UTC",
        files: Iterable[StoredFile] = (),
        criteria: Iterable[str] = (),
        budget: Budget | None = None,
        arm: str | None = None,
        catch_up: CatchUp = "last",
        overlap: Overlap = "skip",
        idempotency_key: str | None = None,
    ) -> ScheduleView:
        """Create a schedule: ``goal`` is submitted at the times of ``cron`` (five fields) in ``time_zone``.

        ``files`` are results of ``client.upload``. ``catch_up`` says what is made up for after a time in which nothing
        ran: ``none``, the ``last`` time, or ``all``, up to a hundred. ``overlap`` says whether a time is left out
        (``skip``) while the task of the time before is open. The tasks have the authority of this client's credential,
        and end with it.
        """
        request = ScheduleRequest(
            goal=goal,
            context=TaskContext(files=tuple(FileRef(file.name, file.digest) for file in files)),
            acceptance_criteria=tuple(criteria),
            budget=budget or Budget(),
            assigned_arm=arm,
            cron=cron,
            time_zone=time_zone,
            catch_up=catch_up,
            overlap=overlap,
        )
        return await self._transport.call(CREATE_SCHEDULE, request, idempotency_key=idempotency_key)

    async def list(self) -> tuple[ScheduleView, ...]:
        """Return the schedules, the oldest first, without their runs."""
        return (await self._transport.call(LIST_SCHEDULES)).schedules

    async def read(self, schedule_id: str) -> ScheduleView:
        """Return a schedule with its last runs."""
        return await self._transport.call(READ_SCHEDULE, schedule_id=schedule_id)

    async def pause(self, schedule_id: str) -> ScheduleView:
        """Pause a schedule. Tasks that it started continue."""
        return await self._transport.call(PAUSE_SCHEDULE, schedule_id=schedule_id)

    async def resume(self, schedule_id: str) -> ScheduleView:
        """Resume a schedule at its next planned time. Runs that were skipped by the pause are not made up for."""
        return await self._transport.call(RESUME_SCHEDULE, schedule_id=schedule_id)

    async def run(self, schedule_id: str) -> TaskView:
        """Submit the task of a schedule now and return it, whatever the schedule's state is."""
        return await self._transport.call(RUN_SCHEDULE, schedule_id=schedule_id)

    async def delete(self, schedule_id: str) -> None:
        """Delete a schedule. Tasks that it started continue."""
        await self._transport.call(DELETE_SCHEDULE, schedule_id=schedule_id)
