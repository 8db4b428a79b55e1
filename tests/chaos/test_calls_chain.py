"""A asks B, which asks C: what is left of the time goes along, and what nobody waits for any more stops everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest
from call_kit import NoContent, Realm, executing, outgoing

from octollm.errors import OctoError
from octollm.resilience import RetryPolicy
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.client import OutgoingCall, ServiceClient
from octollm.testing import wait_until

pytestmark = pytest.mark.usefixtures("every_wire")


@dataclass
class Chain:
    """Three services; the last works for ever, and tells when it began, what was left, and when it ended."""

    realm: Realm
    first: str = ""
    left: list[float] = field(default_factory=list[float])
    began: list[float] = field(default_factory=list[float])
    ended: dict[str, float] = field(default_factory=dict[str, float])

    async def last(self, call: IncomingCall, _body: NoContent) -> NoContent:
        self.began.append(time.monotonic())
        self.left.append(call.deadline.remaining())
        try:
            await asyncio.Event().wait()
        finally:
            self.ended["c"] = time.monotonic()
        raise AssertionError

    def passing(self, name: str, caller: ServiceClient) -> Operation:
        async def ask(call: IncomingCall, _body: NoContent) -> NoContent:
            try:
                made = outgoing(executing(None), call.bearer)
                return await caller.call(OutgoingCall(made.target, made.bearer, call.deadline, made.body), NoContent)
            finally:
                self.ended[name] = time.monotonic()

        return executing(ask)


@contextlib.asynccontextmanager
async def chain() -> AsyncGenerator[Chain]:
    realm = Realm.make()
    made = Chain(realm)
    once = RetryPolicy(max_attempts=1)
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(realm.replica([executing(made.last)]))
        for name in ("b", "a"):
            caller = await stack.enter_async_context(realm.caller(url, retry=once))
            url = await stack.enter_async_context(realm.replica([made.passing(name, caller)]))
        made.first = url
        yield made


def handlers() -> int:
    """Count the calls being served and made in this process."""
    return sum("run_asgi" in str(task.get_coro()) for task in asyncio.all_tasks())


async def test_the_last_of_a_chain_sees_what_is_left_and_all_stop_with_it() -> None:
    async with chain() as made, made.realm.caller(made.first, retry=RetryPolicy(max_attempts=1)) as caller:
        began = time.monotonic()
        with pytest.raises(OctoError) as caught:
            await caller.call(outgoing(executing(None), made.realm.token(), seconds=1.0), NoContent)
        stopped = time.monotonic()
        assert caught.value.code == "deadline_exceeded"
        assert 0 < made.left[0] < 1.0
        await wait_until(lambda: set(made.ended) == {"a", "b", "c"}, description="all three stopped")
        await wait_until(lambda: handlers() == 0, description="no task is left")
        # Nothing waits longer than the time that was given, but for what a busy machine adds.
        latest = max(*made.ended.values(), stopped)
        assert latest - began < 3


@pytest.mark.parametrize("how", ["cancelled", "cut"])
async def test_a_caller_that_leaves_stops_the_last_of_a_chain(how: str) -> None:
    async with chain() as made, made.realm.caller(made.first, retry=RetryPolicy(max_attempts=1)) as caller:
        calling = asyncio.create_task(caller.call(outgoing(executing(None), made.realm.token(), seconds=60), NoContent))
        await wait_until(lambda: bool(made.began), description="the last one works")
        if how == "cancelled":
            calling.cancel()
        else:
            await caller._http.aclose()  # every connection is gone at once, as when a process is killed
        left = time.monotonic()
        await asyncio.wait({calling})
        if not calling.cancelled():
            assert isinstance(calling.exception(), OctoError)
        await wait_until(lambda: set(made.ended) == {"a", "b", "c"}, description="all three stopped")
        await wait_until(lambda: handlers() == 0, description="no task is left")
        assert max(made.ended.values()) - left < 2  # far below the 60 s that were left
