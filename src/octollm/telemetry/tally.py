"""The calls that a service served: counted in plain numbers, which become Prometheus families when somebody asks.

An instrument of the client library takes a lock for every figure, and a call has five. These are counted by the event
loop alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of the buckets."""


class OperationMetrics:
    """The calls of one operation."""

    __slots__ = ("buckets", "name", "statuses", "sum")

    def __init__(self, name: str) -> None:
        self.name = name
        self.statuses: dict[int, int] = {}
        self.buckets = [0] * (len(LATENCY_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, status: int, seconds: float) -> None:
        """Count a call that was answered."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.buckets[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.sum += seconds


class RequestMetrics:
    """All operations of one service."""

    def __init__(self, service: str, registry: CollectorRegistry) -> None:
        self.in_flight = 0
        self._service = service
        self._operations: dict[str, OperationMetrics] = {}
        registry.register(self)

    def operation(self, name: str) -> OperationMetrics:
        """Return the tally of an operation."""
        return self._operations.setdefault(name, OperationMetrics(name))

    def collect(self) -> Iterator[Metric]:
        """Yield the families (what a registry asks its collectors for)."""
        names = ["service", "operation"]
        requests = CounterMetricFamily("octollm_requests_total", "Calls that were answered.", labels=[*names, "status"])
        seconds = HistogramMetricFamily(
            "octollm_request_seconds", "Seconds from a call's headers to the end of its answer.", labels=names
        )
        for operation in self._operations.values():
            for status, count in operation.statuses.items():
                requests.add_metric([self._service, operation.name, str(status)], count)
            total, buckets = 0, list[tuple[str, float]]()
            for bound, count in zip((*map(float, LATENCY_BUCKETS), "+Inf"), operation.buckets, strict=True):
                total += count
                buckets.append((str(bound), total))
            if total:
                seconds.add_metric([self._service, operation.name], buckets, operation.sum)
        in_flight = GaugeMetricFamily("octollm_requests_in_flight", "Calls that are being served.", labels=["service"])
        in_flight.add_metric([self._service], self.in_flight)
        yield from (requests, seconds, in_flight)
