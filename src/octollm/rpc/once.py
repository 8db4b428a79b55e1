"""Doing a call behind its idempotency key: claim, do, store; or answer from what was stored."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
from starlette.responses import Response

from octollm.contracts.problems import problem_of
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.idempotency import (
    LEASE_SECONDS,
    NEVER_STORED,
    Claimed,
    Conflict,
    IdempotencyStore,
    KeyOf,
    Stored,
    Unknown,
)
from octollm.rpc.problems import PROBLEM_JSON

REPLAYED = "Idempotent-Replayed"
_POLL = 0.1


class Once:
    """One call and its key."""

    def __init__(self, store: IdempotencyStore, key: KeyOf, digest: str, *, repeatable: bool, bearer: str) -> None:
        self._store = store
        self._key = key
        self._digest = digest
        self._repeatable = repeatable
        self._bearer = bearer

    async def run(self, work: Callable[[], Awaitable[Response]], deadline: Deadline, request_id: str) -> Response:
        """Do ``work`` once, or answer what it answered before.

        Raises ``idempotency_conflict``, ``outcome_unknown``, ``deadline_exceeded``, and what ``work`` raises.
        """
        while True:
            outcome = await self._store.claim(self._key, self._digest, repeatable=self._repeatable, bearer=self._bearer)
            if isinstance(outcome, Claimed):
                return await self._do(outcome.run, work, request_id)
            if isinstance(outcome, Stored):
                media_type = "application/json" if outcome.status < 400 else PROBLEM_JSON
                return Response(outcome.answer, outcome.status, headers={REPLAYED: "true"}, media_type=media_type)
            if isinstance(outcome, Conflict):
                raise OctoError("This key was used with another body.", code="idempotency_conflict")
            if isinstance(outcome, Unknown):
                raise OctoError(
                    "An earlier call with this key was cut off and may have taken effect.", code="outcome_unknown"
                )
            deadline.check()
            await asyncio.sleep(_POLL)

    async def _do(self, run: int, work: Callable[[], Awaitable[Response]], request_id: str) -> Response:
        try:
            async with self._renewing(run):
                response = await work()
        except OctoError as error:
            problem = problem_of(error, request_id)
            if 400 <= problem.status < 500 and problem.status not in NEVER_STORED:
                await self._store.complete(self._key, run, problem.status, msgspec.json.encode(problem))
            else:
                await self._release(run)
            raise
        except BaseException:
            await self._release(run)
            raise
        await self._store.complete(self._key, run, response.status_code, bytes(response.body))
        return response

    async def _release(self, run: int) -> None:
        # A claim that cannot be given back ends with its lease.
        with contextlib.suppress(OctoError):
            await asyncio.shield(self._store.release(self._key, run))

    @contextlib.asynccontextmanager
    async def _renewing(self, run: int) -> AsyncGenerator[None]:
        async def renew() -> None:
            while True:
                await asyncio.sleep(LEASE_SECONDS / 3)
                # One that is missed is made up by the next; the lease is three long.
                with contextlib.suppress(OctoError):
                    await self._store.renew(self._key, run)

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
