"""How long a watcher bears that the door is away, and how it spaces its tries to come back."""

from __future__ import annotations

import random

from octollm.client.door import GatewayTransport
from octollm.client.errors import APIError, Unavailable
from octollm.resilience import CallFailure, RetryPolicy

RECONNECT_TIMEOUT_SECONDS = 60.0
"""How long the door may be away before a watcher gives up."""
_RECONNECT_POLICY = RetryPolicy(max_attempts=1_000_000, base_delay=0.2, max_delay=2.0)
"""The time bounds the tries, not their number."""


class ReconnectBackoff:
    """Counts from the moment when the door was lost to the one when it is back."""

    def __init__(self, transport: GatewayTransport, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout
        self._until: float | None = None
        self._attempts = 0

    def reset(self) -> None:
        """Note that the door has told something."""
        self._until = None
        self._attempts = 0

    def next_delay(self, error: APIError, hint: str) -> float:
        """Return the seconds until the next try.

        Raises ``error`` itself when trying again cannot help, and :class:`Unavailable` when the time is used up;
        ``what`` says how to go on then.
        """
        if not error.retryable:
            raise error
        now = self._transport.clock.monotonic()
        if self._until is None:
            self._until = now + self._timeout
        self._attempts += 1
        delay = _RECONNECT_POLICY.next_delay(
            CallFailure(True, may_have_started=False, retry_after=error.retry_after),
            attempt=self._attempts,
            is_idempotent=True,
            remaining=self._until - now,
            random=random.random(),  # noqa: S311  jitter is no secret
        )
        if delay is None:
            raise Unavailable(
                f"{self._transport.url} has been away for {self._timeout:g} s. {hint}", code="unavailable"
            ) from error
        return delay
