"""Load balancing over the instances of a service: power of two choices by peak-EWMA latency and calls in flight, a circuit breaker for each instance, and outlier ejection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

CallOutcome = Literal["answered", "erred", "failed", "late", "unknown"]
"""How a call ended for the instance.

It answered; it answered that it could not (500); it did not answer; it did not within the caller's deadline; or that
was not its doing (a caller that left).
"""


@dataclass(frozen=True, slots=True)
class EjectionPolicy:
    """``failures`` in a row eject, or ``slow`` calls in a row that took ``factor`` times what they take elsewhere.

    What takes less than ``floor`` seconds is never slow. An ejection lasts ``seconds``, each further one twice as
    long, up to ``most``. Then one call probes.
    """

    consecutive_failures: int = 5
    consecutive_slow: int = 3
    slow_factor: float = 10.0
    min_slow_seconds: float = 0.05
    base_ejection_seconds: float = 5.0
    max_ejection_seconds: float = 60.0


class CircuitBreaker:
    """What is known of one instance: whether it may be called, and why not."""

    def __init__(self) -> None:
        self.failures = 0
        self.slow = 0
        self.opened_at = -math.inf
        """When it was ejected last."""
        self._times = 0
        self._until: float | None = None
        self._probe_until = 0.0

    @property
    def is_open(self) -> bool:
        """Say whether the instance is out of use, or in it again for a probe only."""
        return self._until is not None

    def allows_call(self, now: float) -> bool:
        """Say whether a call may go to the instance now: half-open, it is the one that probes."""
        return self._until is None or (now >= self._until and now >= self._probe_until)

    def begin_probe(self, now: float, policy: EjectionPolicy) -> None:
        """Note that a call goes out; the next has to wait for its end where it is a probe."""
        if self._until is not None:
            self._probe_until = now + policy.base_ejection_seconds

    def seconds_until_allowed(self, now: float) -> float:
        """Return the seconds until the instance may be called."""
        return 0.0 if self._until is None else max(0.0, self._until - now, self._probe_until - now)

    def record(self, outcome: CallOutcome, *, slow: bool) -> None:
        """Count how a call ended; a probe that went well brings the instance back."""
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
        """Say whether the instance is to be ejected, or for longer when its probe went no better."""
        bad = self.failures >= policy.consecutive_failures or self.slow >= policy.consecutive_slow
        return bad or (self.is_open and (self.failures > 0 or self.slow > 0))

    def open(self, now: float, policy: EjectionPolicy) -> float:
        """Take the instance out of use; return for how many seconds."""
        seconds = min(policy.max_ejection_seconds, policy.base_ejection_seconds * 2.0**self._times)
        self._times = min(self._times + 1, 16)
        self._until = now + seconds
        self.opened_at = now
        self.failures = self.slow = 0
        return seconds

    def forgive(self) -> None:
        """Forget one earlier ejection: the instance has been well for long."""
        self._times = max(0, self._times - 1)


DECAY_SECONDS = 10.0
"""How long a slow call is remembered: latency rises at once and falls with this time constant (peak EWMA)."""
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
    """One instance: what is under way there, how long calls took, whether it is well."""

    def __init__(self, url: str, now: float) -> None:
        self.url = url
        self.in_flight = 0
        self.busy_until = 0.0
        """Until when the instance asked not to be called."""
        self.breaker = CircuitBreaker()
        self.latencies: dict[str, _Latency] = {}
        self.forgiven_at = now

    def load(self, operation: str, now: float) -> float:
        """Return the seconds of work that are under way, with one call more.

        What is known fades while nothing is heard: else one slow call would keep an instance from ever being asked.
        """
        latency = self.latencies.get(operation)
        if latency is None:
            return (self.in_flight + 1) * _DEFAULT_LATENCY
        faded = latency.seconds * math.exp(-max(0.0, now - latency.updated_at) / DECAY_SECONDS)
        return (self.in_flight + 1) * max(faded, _DEFAULT_LATENCY)

    def record_latency(self, operation: str, seconds: float, now: float) -> None:
        """Note how long a call took."""
        latency = self.latencies.get(operation)
        if latency is None:
            if len(self.latencies) < MAX_OPERATIONS:
                self.latencies[operation] = _Latency(seconds, now, 1)
            return
        if seconds >= latency.seconds:
            latency.seconds = seconds
        else:
            share = math.exp(-max(0.0, now - latency.updated_at) / DECAY_SECONDS)
            # At least a tenth, so that many calls in a moment count as well.
            latency.seconds += (seconds - latency.seconds) * max(0.1, 1.0 - share)
        latency.updated_at = now
        latency.samples += 1


@dataclass(frozen=True, slots=True)
class Ejection:
    """An instance was taken out of use for ``seconds``."""

    url: str
    reason: str
    seconds: float


class Balancer:
    """The instances of one service. ``random`` returns an index below its argument."""

    def __init__(self, random: Callable[[int], int], policy: EjectionPolicy | None = None) -> None:
        self._random = random
        self._policy = policy or EjectionPolicy()
        self._urls: Sequence[str] = ()
        self._instances: list[Instance] = []

    @property
    def instances(self) -> Sequence[Instance]:
        """Return what is known, in the order of the addresses."""
        return self._instances

    def update_instances(self, urls: Sequence[str], now: float) -> None:
        """Take over which instances there are; what is known of those that are gone is forgotten."""
        if urls is self._urls or urls == self._urls:
            return
        known = {instance.url: instance for instance in self._instances}
        self._instances = [known.get(url) or Instance(url, now) for url in dict.fromkeys(urls)]
        self._urls = urls

    def pick(self, operation: str, now: float, failed: Set[str] = frozenset()) -> Instance | None:
        """Return the instance to call, whose :meth:`ended` has to follow; ``None`` when none may be called.

        One in ``failed`` is chosen only where there is no other, and so is one that asked for a pause.
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
            # One that may be well again is asked first: without calls it would never be back.
            chosen = probes[0] if probes else self._less_loaded(fresh or allowed, operation, now)
        chosen.breaker.begin_probe(now, self._policy)
        chosen.in_flight += 1
        return chosen

    def seconds_until_available(self, now: float) -> float:
        """Return the seconds until an instance may be called."""
        return min((instance.breaker.seconds_until_allowed(now) for instance in self._instances), default=0.0)

    def record_outcome(
        self, instance: Instance, operation: str, outcome: CallOutcome, seconds: float, now: float
    ) -> Ejection | None:
        """Count a call that :meth:`pick` sent to ``instance``; return what became of the instance by it."""
        instance.in_flight -= 1
        if outcome == "answered":
            instance.record_latency(operation, seconds, now)
        health, alone = instance.breaker, len(self._instances) == 1
        if health.is_open and now - seconds < health.opened_at:
            return None  # it began before: the ejection was the answer to it and its like
        if outcome == "erred" and alone:
            outcome = "answered"  # what one operation cannot do must not close the others
        slow = outcome in ("answered", "late") and self._is_slow(instance, operation, seconds)
        health.record("unknown" if outcome == "late" and not slow else outcome, slow=slow)
        if not health.should_open(self._policy):
            if not health.is_open and now - max(instance.forgiven_at, health.opened_at) > _RECOVERY_SECONDS:
                health.forgive()
                instance.forgiven_at = now
            return None
        if not health.is_open and not self._may_eject(instance):
            return None
        reason = "slow" if health.slow else "failing"
        return Ejection(instance.url, reason, health.open(now, self._policy))

    def _may_eject(self, instance: Instance) -> bool:
        """Say whether one more may go: at most half of them, but a lone one that fails is not called for a while."""
        if len(self._instances) == 1:
            return instance.breaker.failures >= self._policy.consecutive_failures
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
        first = self._random(count)
        second = (first + 1 + self._random(count - 1)) % count
        one, other = instances[first], instances[second]
        return one if one.load(operation, now) <= other.load(operation, now) else other
