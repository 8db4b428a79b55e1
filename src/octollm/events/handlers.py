"""What a handler of a durable subscription gets and may answer, and within which bounds it is called."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from msgspec import Struct

from octollm.contracts.events import Event
from octollm.contracts.subscriptions import AckId
from octollm.errors import OctoError


class QueuedDelivery(Struct, frozen=True):
    """One event for a handler in this process; ``attempt`` counts from 1."""

    event: Event
    ack: AckId
    attempt: int


class RetryDelivery(Exception):  # noqa: N818  an instruction to the subscription, as StopIteration is
    """Raised by a handler: the event is tried again, ``after`` seconds from now or when its subscription says."""

    def __init__(self, reason: str = "", *, after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after = after


class RejectDelivery(Exception):  # noqa: N818
    """Raised by a handler: no further attempt can succeed, so the event becomes a dead letter (or is held)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """Times in seconds and bounds of a consumer in this process.

    ``lease`` is renewed every ``renew``; the same interval bounds how long a new consumer waits for its share.
    ``poll`` is the fallback where no batch arrives from Redis. ``buffer`` bounds the events in memory. ``ack_interval``
    is the least time between two writes of acknowledgements.
    """

    lease: float = 10.0
    renew: float = 2.0
    poll: float = 1.0
    buffer: int = 1000
    ack_interval: float = 0.01
    handler_timeout: float = 60.0

    @property
    def usable_lease(self) -> float:
        """Return how long after a renewal this consumer delivers; the rest is for handlers that are cancelled."""
        return self.lease * 0.8


Handler = Callable[[QueuedDelivery], Awaitable[None]]


def describe_failure(error: Exception) -> str:
    """Return why a handler failed, for operators.

    Only our own errors keep secrets out of their text, so of any other exception only the type is reported.
    """
    if isinstance(error, RetryDelivery | RejectDelivery):
        return error.reason
    return error.detail if isinstance(error, OctoError) else type(error).__name__
