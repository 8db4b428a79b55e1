"""Rate, errors and percentiles of a service's requests, from the metrics of its instances. No I/O."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from octollm.contracts.internal_operations import INTERNAL_OPERATIONS
from octollm.contracts.public_api import PUBLIC_OPERATIONS
from octollm.contracts.service_operations import SERVICE_OPERATIONS

WINDOW_SECONDS = 60.0
"""The figures are of about this time."""
MAX_SERIES = 4096
"""Lines of one kind that are read of one instance."""
_PROBES = frozenset({"health", "ready", "metrics"})
_LEFT_OUT = _PROBES | {
    declared.id.removeprefix(f"{declared.service}:")
    for declared in chain(PUBLIC_OPERATIONS, SERVICE_OPERATIONS, INTERNAL_OPERATIONS)
    if declared.is_live_stream
}
"""Operations that do not count: probes, and streams, which last as long as their reader stays."""
_LINE = re.compile(r"^octollm_(requests_total|request_duration_seconds_bucket)\{([^}]*)\} ([0-9.e+]+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """What one instance has served since its start. ``buckets``: requests of at most so many seconds."""

    requests: float = 0.0
    errors: float = 0.0
    buckets: Mapping[float, float] = field(default_factory=dict[float, float])


def parse_metrics(text: str) -> RequestTotals:
    """Read the request metrics of a service in the Prometheus exposition format."""
    requests = errors = 0.0
    buckets: dict[float, float] = {}
    for count, match in enumerate(_LINE.finditer(text)):
        labels = dict(_LABEL.findall(match[2]))
        if count >= MAX_SERIES:
            break
        if labels.get("operation") in _LEFT_OUT:
            continue
        value = float(match[3])
        if match[1] == "requests_total":
            requests += value
            errors += value if labels.get("status", "").startswith("5") else 0.0
        else:
            bound = float(labels.get("le", "+Inf"))
            buckets[bound] = buckets.get(bound, 0.0) + value
    return RequestTotals(requests, errors, buckets)


@dataclass(frozen=True, slots=True)
class RequestFigures:
    """The figures of a service; ``None`` where there is nothing to compute them from. Percentiles are in seconds."""

    rate: float | None = None
    error_ratio: float | None = None
    percentiles: tuple[float, float, float] | None = None
    """The 50th, 95th and 99th."""


class RequestHistory:
    """The totals of a service's instances over the last minute."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[tuple[float, RequestTotals]]] = {}

    def record(self, totals: Mapping[str, RequestTotals], now: float) -> None:
        """Record the totals of each instance, by its address, at ``now`` (seconds)."""
        for gone in self._samples.keys() - totals.keys():
            del self._samples[gone]
        for instance, total in totals.items():
            samples = self._samples.setdefault(instance, deque())
            # The counters of an instance that was restarted begin at 0.
            if samples and samples[-1][1].requests > total.requests:
                samples.clear()
            samples.append((now, total))
            while len(samples) > 2 and samples[1][0] <= now - WINDOW_SECONDS:
                samples.popleft()

    def compute(self) -> RequestFigures:
        """Return the figures of all instances together."""
        spans = [(samples[0], samples[-1]) for samples in self._samples.values() if len(samples) > 1]
        if not spans:
            return RequestFigures()
        rate = sum(
            (last.requests - first.requests) / (end - start) for (start, first), (end, last) in spans if end > start
        )
        requests = sum(last.requests - first.requests for (_, first), (_, last) in spans)
        errors = sum(last.errors - first.errors for (_, first), (_, last) in spans)
        bounds = sorted({bound for _, (_, last) in spans for bound in last.buckets})
        counts = [
            sum(last.buckets.get(bound, 0.0) - first.buckets.get(bound, 0.0) for (_, first), (_, last) in spans)
            for bound in bounds
        ]
        if requests <= 0:
            return RequestFigures(rate)
        ranks = (0.5, 0.95, 0.99)
        percentiles = tuple(_find_quantile(bounds, counts, rank) for rank in ranks) if counts and counts[-1] else None
        return RequestFigures(rate, errors / requests, percentiles)  # type: ignore[arg-type]


def _find_quantile(bounds: Iterable[float], counts: Iterable[float], rank: float) -> float:
    """Return a quantile of a cumulative histogram, interpolated within its bucket."""
    pairs = list(zip(bounds, counts, strict=True))
    wanted = rank * pairs[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in pairs:
        if count >= wanted and count > below:
            # Of the last bucket, only its lower bound is known.
            return lower if bound == float("inf") else lower + (bound - lower) * (wanted - below) / (count - below)
        if bound != float("inf"):
            lower = bound
        below = count
    return lower
