"""AsyncSubscriptions: durable subscriptions to the event log, their deliveries and dead letters."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence

from octollm.client._transport import GatewayTransport
from octollm.client.streams import RECONNECT_TIMEOUT_SECONDS, ReconnectBackoff
from octollm.concurrency import Retries
from octollm.contracts.event_operations import (
    ACKNOWLEDGE_DELIVERIES,
    DELETE_SUBSCRIPTION,
    DROP_DEAD_LETTER,
    LIST_DEAD_LETTERS,
    LIST_SUBSCRIPTIONS,
    PUT_SUBSCRIPTION,
    READ_DELIVERIES,
    READ_SUBSCRIPTION,
    REPLAY_SUBSCRIPTION,
    RETRY_DEAD_LETTER,
)
from octollm.contracts.events import Event
from octollm.contracts.subscriptions import (
    AckRequest,
    DeadLetter,
    Delivery,
    FailedDelivery,
    ReplayRequest,
    SinkView,
    SubscriptionRequest,
    SubscriptionView,
)
from octollm.errors import OctoError

POLL_WAIT_SECONDS = 20.0
"""How long the gateway waits for a delivery before it answers a poll with none."""


class AsyncSubscriptions:
    """Durable subscriptions, as ``client.subscriptions``. They need the scope ``events:subscribe``.

    Every method raises :class:`~octollm.client.APIError`.
    """

    def __init__(self, transport: GatewayTransport) -> None:
        self._transport = transport

    async def list(self) -> Sequence[SubscriptionView]:
        """Return the tenant's subscriptions with their lag and consumers."""
        return (await self._transport.call(LIST_SUBSCRIPTIONS)).subscriptions

    async def sink(self) -> SinkView | None:
        """Return the event sink of the installation and its lag; ``None`` without one."""
        return (await self._transport.call(LIST_SUBSCRIPTIONS)).sink

    async def read(self, name: str) -> SubscriptionView:
        """Return a subscription with its lag and consumers."""
        return await self._transport.call(READ_SUBSCRIPTION, name=name)

    async def put(self, name: str, request: SubscriptionRequest) -> SubscriptionView:
        """Create a subscription, or change what it selects."""
        return await self._transport.call(PUT_SUBSCRIPTION, request, name=name)

    async def delete(self, name: str) -> None:
        """Delete a subscription with its position and dead letters."""
        await self._transport.call(DELETE_SUBSCRIPTION, name=name)

    async def poll(
        self, name: str, *, consumer: str = "default", limit: int = 100, wait: float = POLL_WAIT_SECONDS
    ) -> Sequence[Delivery]:
        """Return up to ``limit`` deliveries, once there are some or after ``wait`` seconds (at most 30).

        What is not acknowledged comes again. Consumers of different names share the subscription.
        """
        query = {"consumer": consumer, "limit": limit, "wait": wait}
        batch = await self._transport.call(READ_DELIVERIES, query=query, timeout=wait + 30, name=name)
        return batch.deliveries

    async def acknowledge(
        self,
        name: str,
        acked: Iterable[str] = (),
        failed: Iterable[FailedDelivery] = (),
        *,
        consumer: str = "default",
    ) -> None:
        """Report deliveries, by their ``ack_id``, that were handled, in order, and that failed."""
        request = AckRequest(consumer, tuple(acked), tuple(failed))
        await self._transport.call(ACKNOWLEDGE_DELIVERIES, request, name=name)

    async def events(
        self,
        name: str,
        *,
        consumer: str = "default",
        limit: int = 100,
        reconnect_timeout: float = RECONNECT_TIMEOUT_SECONDS,
    ) -> AsyncGenerator[Event]:
        """Yield events without end; each is acknowledged when the next one is requested.

        An event whose handling ends the loop is not acknowledged, and comes again. A connection that breaks is resumed.
        Raises :class:`~octollm.client.Unavailable` when no gateway answers for ``reconnect_timeout`` seconds.
        """
        backoff = ReconnectBackoff(self._transport, reconnect_timeout)
        hint = "What was not acknowledged comes again once it is back."
        async for attempt in Retries(lambda error, _number: backoff.next_delay(error, hint)):
            with attempt:
                while True:
                    deliveries = await self.poll(name, consumer=consumer, limit=limit)
                    backoff.reset()
                    for delivery in deliveries:
                        yield delivery.event
                        try:
                            await self.acknowledge(name, [delivery.ack_id], consumer=consumer)
                        except OctoError as error:
                            # Another consumer has the partition now; the rest of this batch may be its own, too.
                            if error.code != "lease_lost":
                                raise
                            break

    async def replay(self, name: str, *, after: int | None = None, time: str | None = None) -> int:
        """Deliver again after the position ``after``, or from a ``time`` (RFC 3339) on; return the position."""
        return (await self._transport.call(REPLAY_SUBSCRIPTION, ReplayRequest(after, time), name=name)).after

    async def dead_letters(self, subscription: str = "", *, after: int = 0, limit: int = 50) -> Sequence[DeadLetter]:
        """Return up to ``limit`` (1 to 200) dead letters after an id, of one subscription or of all."""
        query = {"subscription": subscription, "after": after, "limit": limit}
        return (await self._transport.call(LIST_DEAD_LETTERS, query=query)).dead_letters

    async def retry_dead_letter(self, letter_id: int) -> None:
        """Deliver a dead letter again."""
        await self._transport.call(RETRY_DEAD_LETTER, letter_id=str(letter_id))

    async def drop_dead_letter(self, letter_id: int) -> None:
        """Drop a dead letter. A subject that it holds continues with the next event."""
        await self._transport.call(DROP_DEAD_LETTER, letter_id=str(letter_id))
