"""Durable subscriptions: which events one selects, what becomes of an event that fails, and the messages about them.

The rules are pure: which event a subscription has, which partition an event is in, and how an acknowledgement is named.
"""

from __future__ import annotations

import difflib
import functools
import re
import zlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal, cast

import msgspec
from msgspec import Meta, Struct

from octollm.contracts.events import EVENT_CATALOGUE, Event, channel_of
from octollm.contracts.task import Count
from octollm.errors import FieldError, OctoError

PARTITIONS = 64
"""Partitions of a subscription. An event's partition follows from its subject, so the order of a subject is kept."""
SUBSCRIPTION_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
SubscriptionName = Annotated[str, Meta(pattern=f"^{SUBSCRIPTION_NAME}$")]
MAX_DATA_CONDITIONS = 16
MAX_RETRY_SECONDS = 24 * 3600.0

Scalar = str | int | float | bool | None
Pattern = Annotated[str, Meta(min_length=1, max_length=128)]
Patterns = Annotated[tuple[Pattern, ...], Meta(min_length=1, max_length=32)]
RetryPause = Annotated[float, Meta(ge=0.001, le=MAX_RETRY_SECONDS)]
Poison = Literal["dead_letter", "hold"]


@functools.lru_cache(maxsize=8192)
def partition_of(tenant: str, subject: str) -> int:
    """Return the partition of a subject's events, from 0 to 63. It is the same in every process and version."""
    return zlib.crc32(f"{tenant}\0{subject}".encode()) % PARTITIONS


class SubscriptionSpec(Struct, frozen=True, forbid_unknown_fields=False):
    """What a durable subscription receives, and how often an event is tried.

    An event is selected when its channel matches one of ``patterns`` (``events:task:*``), its subject one of
    ``subjects`` (glob patterns such as ``task/*``; none: every subject), and each member of ``data``, by its dotted
    path, has the value given or one of the values given.

    The pause after attempt n is ``retry_first`` · 2^(n - 1) seconds, at most ``retry_limit``. After ``max_attempts``
    an event becomes a dead letter and the next one of its subject follows; with ``on_poison="hold"`` its subject stops
    until somebody retries or drops the event. Other subjects go on in either case.
    """

    patterns: Patterns
    subjects: Annotated[tuple[Pattern, ...], Meta(max_length=32)] = ()
    data: Annotated[dict[Pattern, Scalar | tuple[Scalar, ...]], Meta(max_length=MAX_DATA_CONDITIONS)] = {}
    on_poison: Poison = "dead_letter"
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 8
    retry_first: RetryPause = 1.0
    retry_limit: RetryPause = 300.0


def matching_types(pattern: str) -> frozenset[str]:
    """Return the declared event types whose channel matches a glob pattern."""
    return frozenset(name for name in EVENT_CATALOGUE if fnmatchcase(channel_of(name), pattern))


def suggest_patterns(pattern: str) -> list[str]:
    """Return up to three patterns that match something and look like ``pattern``."""
    channels = [channel_of(name) for name in EVENT_CATALOGUE]
    families = sorted({f"{channel.rpartition(':')[0]}:*" for channel in channels})
    return difflib.get_close_matches(pattern, [*channels, *families], n=3, cutoff=0.6)


class EventSelector:
    """Decides which events a subscription has. Raises ``invalid_body`` for a pattern that matches nothing declared."""

    def __init__(self, spec: SubscriptionSpec) -> None:
        self.types = _durable_types(spec.patterns)
        """The types of its events."""
        self._subjects = tuple(re.compile(_glob_to_regex(pattern)) for pattern in spec.subjects)
        self._data = tuple(
            (path.split("."), values if isinstance(values, tuple) else (values,)) for path, values in spec.data.items()
        )

    def matches(self, event: Event) -> bool:
        """Return whether the subscription has ``event``."""
        if event.event_type not in self.types:
            return False
        if self._subjects and not any(subject.fullmatch(event.subject) for subject in self._subjects):
            return False
        return all(_has_value(event.data, path, values) for path, values in self._data)


def _durable_types(patterns: tuple[str, ...]) -> frozenset[str]:
    types: set[str] = set()
    problems: list[FieldError] = []
    for index, pattern in enumerate(patterns):
        found = matching_types(pattern)
        durable = {name for name in found if EVENT_CATALOGUE[name].durable}
        types |= durable
        if durable:
            continue
        if found:
            detail = f"{pattern!r} matches only events that are not in the log: {', '.join(sorted(found))}"
        else:
            near = suggest_patterns(pattern)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; a pattern looks like events:task:*"
            detail = f"{pattern!r} matches no declared event{hint}"
        problems.append(FieldError(f"/patterns/{index}", detail))
    if problems:
        raise OctoError(
            f"The pattern {problems[0].detail}.".replace("?.", "?"), code="invalid_body", field_errors=problems
        )
    return frozenset(types)


def _glob_to_regex(pattern: str) -> str:
    # Only `*` and `?` are special, so a subject with brackets in its name matches itself.
    return "".join(".*" if char == "*" else "." if char == "?" else re.escape(char) for char in pattern)


def _has_value(data: Mapping[str, object], path: list[str], values: tuple[Scalar, ...]) -> bool:
    found: object = data
    for name in path:
        if not isinstance(found, dict) or name not in found:
            return False
        found = cast("dict[str, object]", found)[name]  # pyright: ignore[reportUnnecessaryCast]
    # `True == 1` in Python, and not in JSON.
    return any(found == value and isinstance(found, bool) is isinstance(value, bool) for value in values)


AckKind = Literal["log", "subject", "letter"]
_ACK_ID = re.compile(r"([lsd])\.(\d{1,2})\.(\d{1,15})\.(\d{1,16})\.(\d{1,16})")
_ACK_PREFIXES: dict[str, AckKind] = {"l": "log", "s": "subject", "d": "letter"}


class AckId(Struct, frozen=True):
    """Names one delivery in an acknowledgement.

    ``kind`` is ``log`` for an event in its turn, ``subject`` for one of a delayed subject, ``letter`` for a dead letter
    that is retried. ``fence`` is that of the partition's lease. ``after`` is the position of the delivery before it in
    its partition (of a letter: its id), and ``seq`` that of the event.
    """

    kind: AckKind
    partition: int
    fence: int
    after: int
    seq: int

    def __str__(self) -> str:
        prefix = next(prefix for prefix, kind in _ACK_PREFIXES.items() if kind == self.kind)
        return f"{prefix}.{self.partition}.{self.fence}.{self.after}.{self.seq}"

    @classmethod
    def parse(cls, text: str, pointer: str) -> AckId:
        """Return the id that :meth:`__str__` wrote; raise ``invalid_body`` for any other text."""
        match = _ACK_ID.fullmatch(text)
        if match is None or int(match[2]) >= PARTITIONS:
            detail = "is no ack_id of a delivery"
            raise OctoError(f"{text[:80]!r} {detail}.", code="invalid_body", field_errors=[FieldError(pointer, detail)])
        return cls(_ACK_PREFIXES[match[1]], *(int(part) for part in match.groups()[1:]))


class SubscriptionRequest(SubscriptionSpec, frozen=True):
    """A subscription to create or change. ``start`` is used when it is new.

    ``start``: receive events ``latest`` from now on, from the ``earliest`` in the log, or after a position.
    """

    start: Literal["latest", "earliest"] | Count = "latest"


class Lag(Struct, frozen=True):
    """How far a subscription is behind the log.

    ``positions`` counts the events of the log, of any type, after the last one that is handled in every partition;
    ``seconds`` is the age of the oldest of them, 0 when it has caught up. ``delayed`` and ``held`` count subjects,
    ``dead`` counts dead letters.
    """

    positions: int = 0
    seconds: float = 0.0
    delayed: int = 0
    held: int = 0
    dead: int = 0


class ConsumerView(Struct, frozen=True):
    """A consumer of a subscription: its id, the partitions that it holds, and the seconds left of its lease."""

    consumer: str
    partitions: int
    lease_seconds: float


class SubscriptionView(Struct, frozen=True):
    """A subscription: its ``spec``, its lag, and its consumers."""

    name: str
    spec: SubscriptionSpec
    created_at: str
    lag: Lag
    consumers: tuple[ConsumerView, ...] = ()


class SinkView(Struct, frozen=True):
    """The event sink of the installation, if one is configured, and how far it is behind the log."""

    name: str
    lag: Lag


class SubscriptionList(Struct, frozen=True):
    """A tenant's subscriptions, by name, and the event sink, which has the events of every tenant."""

    subscriptions: tuple[SubscriptionView, ...]
    sink: SinkView | None = None


class DeliveryQuery(Struct, frozen=True):
    """A poll for deliveries by one ``consumer``, an id of its own choice that it keeps over its polls.

    At most ``limit`` deliveries; the response comes when there is one, or after ``wait`` seconds.
    """

    consumer: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "default"
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    wait: Annotated[float, Meta(ge=0, le=30)] = 20.0


class Delivery(Struct, frozen=True):
    """One event for a consumer, and the ``ack_id`` by which it is acknowledged. ``attempt`` counts from 1."""

    event: Event
    ack_id: str
    attempt: int = 1


class DeliveryBatch(Struct, frozen=True):
    """Deliveries in order. Those that are not acknowledged come again in the next poll."""

    deliveries: tuple[Delivery, ...]


class FailedDelivery(Struct, frozen=True):
    """A delivery that its consumer could not handle, and why.

    ``retry_after`` is the pause in seconds instead of the subscription's own. With ``final`` there is no further
    attempt.
    """

    ack_id: str
    reason: Annotated[str, Meta(max_length=500)] = ""
    retry_after: RetryPause | None = None
    final: bool = False


class AckRequest(Struct, frozen=True):
    """The outcome of deliveries: those that were handled, each partition's in order, and those that failed."""

    consumer: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "default"
    acked: Annotated[tuple[str, ...], Meta(max_length=500)] = ()
    failed: Annotated[tuple[FailedDelivery, ...], Meta(max_length=100)] = ()


class ReplayRequest(Struct, frozen=True, omit_defaults=True):
    """Where to go on: after the position ``after``, or from the first event of ``time`` (RFC 3339)."""

    after: Count | None = None
    time: Annotated[str, Meta(max_length=40)] | None = None


class ReplayResult(Struct, frozen=True):
    """The position after which the subscription goes on."""

    after: int


class DeadLetter(Struct, frozen=True):
    """An event whose delivery was given up.

    ``state``: ``dead``, ``held`` (its subject waits for it) or ``retrying``.
    """

    id: int
    subscription: str
    state: Literal["dead", "held", "retrying"]
    event: Event
    attempts: int
    reason: str
    created_at: str


class DeadLetterQuery(Struct, frozen=True):
    """A page of dead letters after the id ``after``, of one subscription or of all."""

    subscription: Annotated[str, Meta(max_length=64)] = ""
    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=200)] = 50


class DeadLetterList(Struct, frozen=True):
    """A page of dead letters, oldest first. ``after`` requests the next page."""

    dead_letters: tuple[DeadLetter, ...]
    after: int


def decode_spec(value: object) -> SubscriptionSpec:
    """Return the spec of a row of the database."""
    return msgspec.convert(value, SubscriptionSpec)
