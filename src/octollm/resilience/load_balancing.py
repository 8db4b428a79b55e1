"""Load balancing over the instances of a service.

Power of two choices by peak-EWMA latency and calls in flight, a circuit breaker per instance, and outlier ejection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

CallOutcome = Literal["answered", "erred", "failed", "late", "unknown"]
"""How a call ended, as far as the instance is concerned.

It answered; it answered with an internal error (500); it did not answer; it missed the caller's deadline; or the call
says nothing about the instance (the caller was cancelled).
"""


@dataclass(frozen=True, slots=True)
class EjectionPolicy:
    """When an instance is ejected: after consecutive failures, or consecutive calls slower than its peers.

    A call is slow if it takes ``slow_factor`` times the median latency of the other instances, and at least
    ``min_slow_seconds``. An ejection lasts ``base_ejection_seconds``, twice as long each further time, up to
    ``max_ejection_seconds``; then one call probes the instance.
    """

    consecutive_failures: int = 5
    consecutive_slow: int = 3
    slow_factor: float = 10.0
    min_slow_seconds: float = 0.05
    base_ejection_seconds: float = 5.0
    max_ejection_seconds: float = 60.0


class CircuitBreaker:
    """The circuit breaker of one instance: closed, open, or half-open with one probe."""

    def __init__(self) -> None:
        self.failures = 0
        self.slow = 0
        self.opened_at = -math.inf
        """When the circuit last opened."""
        self._times = 0
        self._until: float | None = None
        self._probe_until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open or half-open."""
        return self._until is not None

    def allows_call(self, now: float) -> bool:
        """Return whether a call may go to the instance now; half-open, that call is the probe."""
        return self._until is None or (now >= self._until and now >= self._probe_until)

    def begin_probe(self, now: float, policy: EjectionPolicy) -> None:
        """Record that a call goes out: if it is a probe, the next call waits for its outcome."""
        if self._until is not None:
            # Bounded: a probe whose outcome is never recorded does not block the instance for ever.
            self._probe_until = now + policy.base_ejection_seconds

    def seconds_until_allowed(self, now: float) -> float:
        """Return the seconds until the instance may be called."""
        return 0.0 if self._until is None else max(0.0, self._until - now, self._probe_until - now)

    def record(self, outcome: CallOutcome, *, slow: bool) -> None:
        """Count the outcome of a call; a successful probe closes the circuit."""
        # Also after an unknown outcome, so that the next call may be the probe.
        self._probe_until = 0.0
        if outcome == "unknown":
            return
        self.slow = self.slow + 1 if slow else 0
        if outcome in ("failed", "erred"):
            self.failures += 1
        elif outcome == "answered":
            self.failures = 0
            if not slow:
                self._until = None

    def should_open(self, policy: EjectionPolicy) -> bool:
        """Return whether the circuit should open, or open again after a failed probe."""
        unhealthy = self.failures >= policy.consecutive_failures or self.slow >= policy.consecutive_slow
        return unhealthy or (self.is_open and (self.failures > 0 or self.slow > 0))

    def open(self, now: float, policy: EjectionPolicy) -> float:
        """Open the circuit and return for how many seconds."""
        seconds = min(policy.max_ejection_seconds, policy.base_ejection_seconds * 2.0**self._times)
        # The exponent is bounded, since a float overflows after a thousand ejections.
        self._times = min(self._times + 1, 16)
        self._until = now + seconds
        self.opened_at = now
        self.failures = self.slow = 0
        return seconds

    def forgive(self) -> None:
        """Forget one earlier ejection of an instance that has been healthy for a while."""
        self._times = max(0, self._times - 1)


DECAY_SECONDS = 10.0
"""Time constant of the peak EWMA: latency rises at once and decays with this constant."""
MIN_SAMPLES = 3
MAX_OPERATIONS = 64
_DEFAULT_LATENCY = 0.001
_RECOVERY_SECONDS = 60.0


@dataclass(slots=True)
class _Latency:
    seconds: float
    updated_at: float
    samples: int


class Instance:
    """One instance: its calls in flight, its latency per operation, and its circuit breaker."""

    def __init__(self, url: str, now: float) -> None:
        self.url = url
        self.in_flight = 0
        self.busy_until = 0.0
        """Until when the instance asked not to be called (``Retry-After``)."""
        self.breaker = CircuitBreaker()
        self.latencies: dict[str, _Latency] = {}
        self.forgiven_at = now

    def load(self, operation: str, now: float) -> float:
        """Return the expected seconds of work in flight, with one more call.

        The latency decays without calls, or one slow call would keep an instance from being picked ever again.
        """
        latency = self.latencies.get(operation)
        if latency is None:
            return (self.in_flight + 1) * _DEFAULT_LATENCY
        decayed = latency.seconds * math.exp(-max(0.0, now - latency.updated_at) / DECAY_SECONDS)
        return (self.in_flight + 1) * max(decayed, _DEFAULT_LATENCY)

    def record_latency(self, operation: str, seconds: float, now: float) -> None:
        """Add the latency of a call to the peak EWMA."""
        latency = self.latencies.get(operation)
        if latency is None:
            if len(self.latencies) < MAX_OPERATIONS:
                self.latencies[operation] = _Latency(seconds, now, 1)
            return
        if seconds >= latency.seconds:
            latency.seconds = seconds
        else:
            weight = 1.0 - math.exp(-max(0.0, now - latency.updated_at) / DECAY_SECONDS)
            # At least a tenth, so that a burst of fast calls in one moment counts as well.
            latency.seconds += (seconds - latency.seconds) * max(0.1, weight)
        latency.updated_at = now
        latency.samples += 1


@dataclass(frozen=True, slots=True)
class Ejection:
    """An instance was ejected for ``seconds``."""

    url: str
    reason: str
    seconds: float
    reopened: bool = False
    """A probe failed: the instance was ejected before, and stays so for longer."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """The circuit of an ejected instance closed: its probe was answered."""

    url: str


class Balancer:
    """The instances of one service. ``random`` returns an index below its argument."""

    def __init__(self, random: Callable[[int], int], policy: EjectionPolicy | None = None) -> None:
        self._random = random
        self._policy = policy or EjectionPolicy()
        self._urls: Sequence[str] = ()
        self._instances: list[Instance] = []

    @property
    def instances(self) -> Sequence[Instance]:
        """The instances, in the order of their addresses."""
        return self._instances

    def update_instances(self, urls: Sequence[str], now: float) -> None:
        """Replace the instances, keeping the state of those that stay."""
        if urls is self._urls or urls == self._urls:
            return
        known = {instance.url: instance for instance in self._instances}
        self._instances = [known.get(url) or Instance(url, now) for url in dict.fromkeys(urls)]
        self._urls = urls

    def pick(self, operation: str, now: float, failed: Set[str] = frozenset()) -> Instance | None:
        """Return the instance to call, or ``None`` if every circuit is open; :meth:`record_outcome` must follow.

        An instance in ``failed``, or one that asked for a pause, is picked only when there is no other.
        """
        instances = self._instances
        if len(instances) == 1:
            chosen = instances[0]
            if not chosen.breaker.allows_call(now):
                return None
        else:
            allowed = [instance for instance in instances if instance.breaker.allows_call(now)]
            if not allowed:
                return None
            fresh = [each for each in allowed if each.url not in failed and each.busy_until <= now]
            probes = [each for each in fresh if each.breaker.is_open]
            # A half-open instance goes first: without calls it would never be closed again.
            chosen = probes[0] if probes else self._less_loaded(fresh or allowed, operation, now)
        chosen.breaker.begin_probe(now, self._policy)
        chosen.in_flight += 1
        return chosen

    def seconds_until_available(self, now: float) -> float:
        """Return the seconds until an instance may be called."""
        return min((instance.breaker.seconds_until_allowed(now) for instance in self._instances), default=0.0)

    def record_outcome(
        self, instance: Instance, operation: str, outcome: CallOutcome, seconds: float, now: float
    ) -> Ejection | Recovery | None:
        """Record the outcome of a call that :meth:`pick` sent to ``instance``; return what follows for its circuit."""
        instance.in_flight -= 1
        if outcome == "answered":
            instance.record_latency(operation, seconds, now)
        health, alone = instance.breaker, len(self._instances) == 1
        if health.is_open and now - seconds < health.opened_at:
            return None  # the call began before the ejection, which already accounts for such calls
        if outcome == "erred" and alone:
            outcome = "answered"  # a lone instance stays in use: one failing operation must not block the others
        slow = outcome in ("answered", "late") and self._is_slow(instance, operation, seconds)
        was_open = health.is_open
        # A missed deadline may mean that the caller allowed too little: it counts when the peers are far faster.
        health.record("unknown" if outcome == "late" and not slow else outcome, slow=slow)
        if not health.should_open(self._policy):
            if not health.is_open and now - max(instance.forgiven_at, health.opened_at) > _RECOVERY_SECONDS:
                health.forgive()
                instance.forgiven_at = now
            return Recovery(instance.url) if was_open and not health.is_open else None
        if not health.is_open and not self._may_eject(instance):
            return None
        reason = "slow" if health.slow else "failing"
        return Ejection(instance.url, reason, health.open(now, self._policy), was_open)

    def _may_eject(self, instance: Instance) -> bool:
        """Return whether one more may be ejected: at most half of them, and a lone one only for failures."""
        # A lone instance that is slow still serves, and there is no faster one. One that fails gains time to recover.
        if len(self._instances) == 1:
            return instance.breaker.failures >= self._policy.consecutive_failures
        # The calls of an ejected instance go to the others: past half of them, an overload would spread to all.
        return sum(each.breaker.is_open for each in self._instances) < len(self._instances) // 2

    def _is_slow(self, instance: Instance, operation: str, seconds: float) -> bool:
        if seconds < self._policy.min_slow_seconds or len(self._instances) == 1:
            return False
        others = sorted(
            latency.seconds
            for each in self._instances
            if each is not instance
            and (latency := each.latencies.get(operation)) is not None
            and latency.samples >= MIN_SAMPLES
        )
        return bool(others) and seconds > self._policy.slow_factor * others[len(others) // 2]

    def _less_loaded(self, instances: Sequence[Instance], operation: str, now: float) -> Instance:
        count = len(instances)
        if count == 1:
            return instances[0]
        # Power of two choices: the less loaded of two random instances, so that clients do not herd on one.
        first = self._random(count)
        second = (first + 1 + self._random(count - 1)) % count
        one, other = instances[first], instances[second]
        return one if one.load(operation, now) <= other.load(operation, now) else other
