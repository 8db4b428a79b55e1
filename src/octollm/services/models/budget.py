"""The budget of tasks, kept by the orchestrator: reserved before a call, settled after it, however it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec

from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock
from octollm.concurrency import retry
from octollm.contracts.declarations import BodyT, DeclaredOperation
from octollm.contracts.internal import ReserveRequest, ReserveResponse, SettleRequest
from octollm.contracts.internal_operations import RESERVE_BUDGET, SETTLE_BUDGET
from octollm.contracts.problems import to_problem
from octollm.contracts.task import Usage
from octollm.errors import OctoError
from octollm.resilience import Deadline, retry_until
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.telemetry import Logger

T = TypeVar("T")

RESERVE_SECONDS = 10.0
SETTLE_SECONDS = 30.0
"""How long settling is tried; after that the reservation stands until the orchestrator ends it itself."""
CLOSE_SECONDS = 1.0
_RETRY_SECONDS = 0.5
_NULL = msgspec.Raw(b"null")


class BudgetClient:
    """Reserves and settles in the name of the models service."""

    def __init__(self, caller: ServiceClient, signer: ServiceTokenSigner, *, clock: Clock, log: Logger) -> None:
        self._caller = caller
        self._signer = signer
        self._clock = clock
        self._log = log
        self._running: set[asyncio.Task[Any]] = set()

    async def reserve(self, request: ReserveRequest, deadline: Deadline) -> ReserveResponse:
        """Reserve tokens for a call; or learn what it was answered before.

        A caller that leaves meanwhile leaves no reservation behind. Raises ``budget_exhausted``, ``fence_lost``,
        ``state_conflict`` and the transport's failures.
        """
        within = Deadline.after(self._clock, min(RESERVE_SECONDS, deadline.remaining()))
        call = self._build_call(RESERVE_BUDGET, request, within)
        # Shielded: if the request were cut off, a reservation could exist whose id nobody knows.
        reserving = self._track(self._caller.call(call, ReserveResponse), "reserve")
        try:
            return await asyncio.shield(reserving)
        except asyncio.CancelledError:
            self._track(self._release(reserving), "give back")
            raise

    def settle(self, reservation: str, usage: Usage, answer: msgspec.Raw = _NULL) -> asyncio.Task[None]:
        """Settle a reservation, beside whatever happens to the caller. ``answer`` is kept for repeats when whole."""
        return self._track(self._settle(SettleRequest(reservation, usage, answer)), "settle")

    async def aclose(self) -> None:
        """Wait a moment for what is still being settled; a closing installation has no more time than that."""
        deadline = Deadline.after(self._clock, CLOSE_SECONDS)
        while self._running and deadline.remaining() > 0:
            await asyncio.wait(set(self._running), timeout=deadline.remaining())
        for task in self._running:
            task.cancel()

    def _track(self, work: Coroutine[object, object, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _release(self, reserving: asyncio.Task[ReserveResponse]) -> None:
        try:
            reserved = await reserving
        except OctoError:
            return  # nothing was reserved, or nobody can say so: the orchestrator ends it with its task
        if reserved.reservation:
            await self._settle(SettleRequest(reserved.reservation, Usage()))

    async def _settle(self, settled: SettleRequest) -> None:
        deadline = Deadline.after(self._clock, SETTLE_SECONDS)

        async def send() -> None:
            await self._caller.send(self._build_call(SETTLE_BUDGET, settled, deadline))

        try:
            await retry(send, retry_until(deadline, _RETRY_SECONDS, lambda error: to_problem(error).retryable))
        except OctoError as error:
            self._log.error("budget.not_settled", reservation=settled.reservation, error=error)

    def _build_call(self, declared: DeclaredOperation[BodyT, Any], body: BodyT, deadline: Deadline) -> OutgoingCall:
        return OutgoingCall(
            CallTarget.of(declared), self._signer.sign_token("orchestrator"), deadline, msgspec.json.encode(body)
        )
