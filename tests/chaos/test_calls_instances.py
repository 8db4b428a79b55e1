"""Instances of a service that shed, hang and fail: what their callers meet, and what reaches the instances."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from call_kit import NoContent, Realm, executing, outgoing
from wires import DIRECT

from octollm.errors import OctoError
from octollm.resilience import RetryPolicy
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.client import ServiceClient


async def called(caller: ServiceClient, realm: Realm, work: Operation, *, seconds: float = 5) -> str:
    """Make a call; return ``ok`` or the code that it failed with."""
    try:
        await caller.call(outgoing(work, realm.token(), seconds=seconds), NoContent)
    except OctoError as error:
        return error.code
    return "ok"


@pytest.mark.usefixtures("every_wire")
async def test_a_storm_of_refusals_is_not_multiplied() -> None:
    realm = Realm.make()
    arrived = 0

    async def shed(_call: IncomingCall, _body: NoContent) -> NoContent:
        nonlocal arrived
        arrived += 1
        raise OctoError("Too much.", code="overloaded", retry_after=0)

    work = executing(shed)
    async with (
        realm.replica([work]) as url,
        realm.caller(url, retry=RetryPolicy(max_attempts=5, base_delay=0.001)) as caller,
    ):
        found: list[str] = []
        for _ in range(3):
            found += await asyncio.gather(*(called(caller, realm, work) for _ in range(150)))
    assert set(found) <= {"overloaded", "unavailable"}
    # The budget begins with a few retries to spare, whatever the number of calls.
    assert arrived <= 1.2 * len(found) + 10


async def test_an_instance_that_is_far_slower_is_left_alone_and_the_whole_is_fast_again() -> None:
    realm = Realm.make()

    slow = 0.01
    behind = [slow, slow, slow]
    served = [0, 0, 0]

    def varying(number: int) -> Operation:
        async def wait(_call: IncomingCall, _body: NoContent) -> NoContent:
            served[number] += 1
            await asyncio.sleep(behind[number])
            return NoContent()

        return executing(wait)

    work = varying(0)
    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(realm.replica([varying(number)])) for number in range(3)]
        caller = await stack.enter_async_context(realm.caller(*urls))

        async def burst(seconds: float) -> None:
            until = time.monotonic() + seconds

            async def one() -> None:
                while time.monotonic() < until:
                    assert await called(caller, realm, work) == "ok"

            await asyncio.gather(*(one() for _ in range(8)))

        await burst(0.5)
        behind[0] = 100 * slow
        await burst(2.0)
        # Two seconds after it began hardly any call meets the slow one: its probes, of hundreds of calls.
        served[:] = [0, 0, 0]
        await burst(1.0)
        assert served[0] <= 2 + 0.02 * sum(served), served
        ejected = caller._service_state("coder").balancer.instances[0]
        assert ejected.url == urls[0]
        # It is well again, and it is called again once it has been looked at.
        behind[0] = slow
        async with asyncio.timeout(60):
            while ejected.breaker.is_open:
                await burst(0.2)


@pytest.mark.usefixtures("every_wire")
async def test_when_every_instance_fails_half_of_them_stay_in_use() -> None:
    realm = Realm.make()
    arrived: list[int] = [0, 0, 0, 0]

    def failing(number: int) -> Operation:
        async def fail(_call: IncomingCall, _body: NoContent) -> NoContent:
            arrived[number] += 1
            raise ValueError("broken")

        return executing(fail)

    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(realm.replica([failing(number)])) for number in range(4)]
        caller = await stack.enter_async_context(realm.caller(*urls, retry=RetryPolicy(max_attempts=1)))
        work = failing(0)
        first = [await called(caller, realm, work) for _ in range(100)]
        assert set(first) == {"internal"}
        health = [instance.breaker.is_open for instance in caller._service_state("coder").balancer.instances]
        assert health.count(True) == 2
        before = list(arrived)
        assert {await called(caller, realm, work) for _ in range(20)} == {"internal"}
        assert [now - then for now, then in zip(arrived, before, strict=True)].count(0) <= 2
        assert sum(arrived) == sum(before) + 20


@pytest.mark.parametrize("every_wire", DIRECT, indirect=True)
@pytest.mark.usefixtures("every_wire")
async def test_an_instance_that_is_gone_costs_its_callers_a_try() -> None:
    realm = Realm.make()

    async def succeed(_call: IncomingCall, _body: NoContent) -> NoContent:
        return NoContent()

    work = executing(succeed)
    async with contextlib.AsyncExitStack() as stack:
        going = contextlib.AsyncExitStack()
        urls = [await going.enter_async_context(realm.replica([work]))]
        urls += [await stack.enter_async_context(realm.replica([work])) for _ in range(2)]
        caller = await stack.enter_async_context(realm.caller(*urls))
        assert {await called(caller, realm, work) for _ in range(50)} == {"ok"}
        await going.aclose()
        assert {await called(caller, realm, work) for _ in range(200)} == {"ok"}
