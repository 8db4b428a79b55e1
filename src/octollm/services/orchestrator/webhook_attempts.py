"""One attempt to deliver an event: the request, what its outcome means, and when the next attempt is due.

The decisions are plain functions over values. Sending is the only I/O.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from octollm.clock import Clock
from octollm.contracts.event_formats import encode_cloudevent
from octollm.contracts.events import Event
from octollm.contracts.webhooks import WebhookFormat
from octollm.errors import OctoError
from octollm.rpc.http_client import HttpClient
from octollm.services.orchestrator.webhook_signatures import sign_standard

ATTEMPT_SECONDS = 15.0
"""Time for a whole attempt, with name resolution, connection and response."""
MAX_READ_BYTES = 64 * 1024
"""Bytes of a response that are read, so that its connection can be used again; past them it is closed."""
FIRST_PAUSE = 5.0
PAUSE_FACTOR = 4.0
LONGEST_PAUSE = 4 * 3600.0
MAX_RETRY_AFTER = 3600.0
"""A receiver may ask for a longer pause, up to this."""
GIVE_UP_SECONDS = 24 * 3600.0
"""An event that was not delivered for this long becomes a dead letter."""
PROBING_FAILURES = 5
"""After this many failures in a row a receiver gets one attempt at a time, with growing pauses between them."""
FIRST_PROBE_PAUSE = 2.0
LONGEST_PROBE_PAUSE = 300.0

_RETRY_AFTER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class AttemptOutcome:
    """What came of an attempt. ``status`` is 0 without an answer, ``retry_after`` in seconds."""

    status: int
    error: str = ""
    retry_after: float | None = None

    @property
    def delivered(self) -> bool:
        """Whether the receiver took the event."""
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether the receiver wants no further event (RFC 9110 section 15.5.11)."""
        return self.status == 410


@dataclass(frozen=True, slots=True)
class AttemptDecision:
    """What becomes of a delivery: it is done, or due again ``pause`` seconds later, or a dead letter."""

    state: Literal["pending", "delivered", "dead"]
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class ReceiverHealth:
    """How a receiver does: ``failures`` in a row, and since when it fails (epoch seconds; ``None``: it does not)."""

    failures: int = 0
    failing_since: float | None = None

    @property
    def is_probing(self) -> bool:
        """Whether it gets one attempt at a time."""
        return self.failures >= PROBING_FAILURES


def decide_attempt(
    outcome: AttemptOutcome, *, attempts: int, first_attempt_at: float, now: float, random: float
) -> AttemptDecision:
    """Return what becomes of a delivery after its attempt number ``attempts`` (from 1); ``random`` is from 0 to 1.

    Pauses grow from 5 s to 4 h, with equal jitter: half of the pause is fixed, so that retries spread and never follow
    at once.
    """
    if outcome.delivered:
        return AttemptDecision("delivered")
    if outcome.gone or now - first_attempt_at >= GIVE_UP_SECONDS:
        return AttemptDecision("dead")
    # The exponent is bounded because a power overflows a float after some thousand attempts.
    full = min(LONGEST_PAUSE, FIRST_PAUSE * PAUSE_FACTOR ** min(attempts - 1, 16))
    asked = min(outcome.retry_after or 0.0, MAX_RETRY_AFTER)
    return AttemptDecision("pending", max(asked, full * (0.5 + random / 2)))


def decide_health(health: ReceiverHealth, outcome: AttemptOutcome, now: float) -> ReceiverHealth:
    """Return the health of a receiver after an attempt."""
    if outcome.delivered:
        return ReceiverHealth()
    since = now if health.failing_since is None else health.failing_since
    return ReceiverHealth(health.failures + 1, since)


def decide_disabling(health: ReceiverHealth, outcome: AttemptOutcome, now: float) -> str:
    """Return why a webhook is disabled after an attempt; empty if it is not."""
    if outcome.gone:
        return "The receiver answered 410 Gone."
    # By time, not by number: a busy webhook fails often within minutes, and a quiet one a few times a day.
    if health.failing_since is not None and now - health.failing_since >= GIVE_UP_SECONDS:
        return f"Every delivery failed for 24 hours; the last one: {outcome.error}"
    return ""


def probe_pause(health: ReceiverHealth, outcome: AttemptOutcome, random: float) -> float:
    """Return the seconds for which a receiver is left alone after a failure; 0 while it is not probed."""
    # ``Retry-After`` concerns the receiver, so it pauses all of its deliveries, also those of a healthy one.
    asked = min(outcome.retry_after or 0.0, MAX_RETRY_AFTER)
    if not health.is_probing:
        return asked
    full = min(LONGEST_PROBE_PAUSE, FIRST_PROBE_PAUSE * 2.0 ** min(health.failures - PROBING_FAILURES, 16))
    return max(asked, full * (0.5 + random / 2))


def build_request(event: Event, body_format: WebhookFormat) -> tuple[dict[str, str], str]:
    """Return the headers and the body of a delivery, before it is signed."""
    if body_format == "octollm":
        return {"content-type": "application/json"}, msgspec.json.encode(event).decode()
    mode = "structured" if body_format == "cloudevents" else "binary"
    message = encode_cloudevent(event, mode)
    return dict(message.headers), message.body.decode()


class WebhookSender:
    """Sends events to receivers, through the egress guard."""

    def __init__(self, http: HttpClient, clock: Clock) -> None:
        self._http = http
        self._clock = clock

    async def send(self, url: str, secrets: Sequence[str], event: Event, body_format: WebhookFormat) -> AttemptOutcome:
        """Return the outcome of one attempt; it raises nothing that a receiver can cause.

        The event's id is the ``webhook-id`` of every attempt. Redirects are not followed, and count as failures.
        """
        if not secrets:
            return AttemptOutcome(0, "The secret cannot be decrypted: give the webhook a new one.")
        headers, body = build_request(event, body_format)
        headers |= sign_standard(secrets, event.id, self._clock.now(), body)
        headers["user-agent"] = "octollm-webhooks"
        outcome: AttemptOutcome | None = None
        try:
            async with self._http.stream("POST", url, headers, body.encode(), seconds=ATTEMPT_SECONDS) as response:
                retry_after = response.headers.get("retry-after", "")
                outcome = AttemptOutcome(
                    response.status,
                    "" if 200 <= response.status < 300 else f"The receiver answered {response.status}.",
                    float(retry_after) if _RETRY_AFTER.fullmatch(retry_after) else None,
                )
                size = 0
                async for chunk in response.chunks:
                    size += len(chunk)
                    if size > MAX_READ_BYTES:
                        break
                return outcome
        except OctoError as error:
            # The status decides, so what follows it changes nothing: a body without an end only costs a connection.
            return outcome or AttemptOutcome(0, error.detail)
