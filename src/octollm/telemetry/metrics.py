"""Every metric of a service, in the Prometheus exposition format.

Request metrics are plain counters that become metric families on a scrape: an instrument of the client library takes a
lock for each value, and a request has five.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of the histogram's buckets, in seconds."""


class OperationMetrics:
    """Counts and durations of one operation's requests."""

    __slots__ = ("buckets", "name", "statuses", "sum")

    def __init__(self, name: str) -> None:
        self.name = name
        self.statuses: dict[int, int] = {}
        self.buckets = [0] * (len(LATENCY_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, status: int, seconds: float) -> None:
        """Record a response."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.buckets[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.sum += seconds


class RequestMetrics:
    """Request metrics of one service, by operation; a collector of the Prometheus client library."""

    def __init__(self, service: str, registry: CollectorRegistry) -> None:
        self.in_flight = 0
        self._service = service
        self._operations: dict[str, OperationMetrics] = {}
        registry.register(self)

    def operation(self, name: str) -> OperationMetrics:
        """Return the metrics of an operation, which are created at its first request."""
        return self._operations.setdefault(name, OperationMetrics(name))

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families; the registry calls this at each scrape."""
        names = ["service", "operation"]
        requests = CounterMetricFamily("octollm_requests_total", "Requests served.", labels=[*names, "status"])
        seconds = HistogramMetricFamily(
            "octollm_request_duration_seconds",
            "Seconds from a request's headers to the end of its response.",
            labels=names,
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
        in_flight = GaugeMetricFamily("octollm_requests_in_flight", "Requests in progress.", labels=["service"])
        in_flight.add_metric([self._service], self.in_flight)
        yield from (requests, seconds, in_flight)


class Metrics:
    """The metrics of one service, in their own registry because several services may share a process."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry(auto_describe=False)
        registry = self.registry
        self.requests = RequestMetrics(service, registry)
        self.calls = Counter(
            "octollm_calls_total",
            "Calls to other services, by outcome: `ok` or an error code.",
            ["service", "target", "operation", "outcome"],
            registry=registry,
        )
        self.call_retries = Counter(
            "octollm_call_retries_total",
            "Retries of calls to other services.",
            ["service", "target"],
            registry=registry,
        )
        self.ejections = Counter(
            "octollm_ejections_total",
            "Ejections of instances by outlier detection or an open circuit breaker, by reason.",
            ["service", "target", "reason"],
            registry=registry,
        )
        self.tasks = Counter("octollm_tasks_total", "Tasks that ended, by final status.", ["status"], registry=registry)
        self.tasks_running = Gauge("octollm_tasks_running", "Tasks that this process is running.", registry=registry)
        self.tasks_waiting = Gauge(
            "octollm_tasks_waiting", "Tasks of the installation that wait for a worker.", registry=registry
        )
        self.tokens = Counter(
            "octollm_model_tokens_total",
            "Tokens that models read (prompt) and wrote (completion).",
            ["model", "kind"],
            registry=registry,
        )
        self.events = Counter("octollm_events_total", "Events published.", ["event_type"], registry=registry)
        self.subscription_lag_positions = Gauge(
            "octollm_subscription_lag_positions",
            "Events of the log after the last one that a durable subscription has handled.",
            ["tenant", "subscription"],
            registry=registry,
        )
        self.subscription_lag_seconds = Gauge(
            "octollm_subscription_lag_seconds",
            "Age of the oldest event that a durable subscription has not handled.",
            ["tenant", "subscription"],
            registry=registry,
        )
        self.subscription_dead_letters = Gauge(
            "octollm_subscription_dead_letters",
            "Dead letters of a durable subscription.",
            ["tenant", "subscription"],
            registry=registry,
        )
        self.webhook_attempts = Counter(
            "octollm_webhook_attempts_total",
            "Attempts to deliver an event to a webhook: `delivered`, `failed` (retried later) or `dead` (the last).",
            ["outcome"],
            registry=registry,
        )
        self.webhook_feed_lag = Gauge(
            "octollm_webhook_feed_lag_events",
            "Events of the log that the webhooks have not processed.",
            registry=registry,
        )
        self.webhook_pending = Gauge(
            "octollm_webhook_pending_deliveries",
            "Deliveries of a webhook that wait for their first or a further attempt.",
            ["tenant", "webhook"],
            registry=registry,
        )
        self.webhook_oldest_seconds = Gauge(
            "octollm_webhook_oldest_pending_seconds",
            "Age of the oldest pending delivery of a webhook.",
            ["tenant", "webhook"],
            registry=registry,
        )
        self.webhook_dead = Gauge(
            "octollm_webhook_dead_deliveries",
            "Dead letters of a webhook that were neither replayed nor deleted.",
            ["tenant", "webhook"],
            registry=registry,
        )
        self.sink_lag = Gauge(
            "octollm_event_sink_lag_events", "Events of the log that the event sink does not have.", registry=registry
        )
        self.sink_lag_seconds = Gauge(
            "octollm_event_sink_lag_seconds",
            "Age of the oldest event that the event sink does not have.",
            registry=registry,
        )
        self.sink_events = Counter(
            "octollm_event_sink_events_total",
            "Events that the event sink acknowledged: `stored`, or `duplicate` when it had them already.",
            ["outcome"],
            registry=registry,
        )
        self.sent_events = Counter(
            "octollm_events_sent_total",
            "Events that a service sent to the orchestrator, or dropped because they were refused or too many waited.",
            ["service", "outcome"],
            registry=registry,
        )
        self.outbox_lag = Gauge(
            "octollm_outbox_lag_events", "Numbered events that this replica has not published.", registry=registry
        )
        self.outbox_lag_seconds = Gauge(
            "octollm_outbox_lag_seconds",
            "Seconds since the publisher last had no unpublished events; 0 while there are none.",
            registry=registry,
        )
        self.outbox_leader = Gauge(
            "octollm_outbox_leader", "1 on the replica that publishes events, 0 on the others.", registry=registry
        )
        self.retention_deleted = Counter(
            "octollm_retention_deleted_total",
            "Rows that retention deleted, by kind; `truncated` are events that a durable reader had not handled.",
            ["kind"],
            registry=registry,
        )
        self.live_connections = Gauge("octollm_live_connections", "Open live connections.", ["kind"], registry=registry)
        self.rejected_requests = Counter(
            "octollm_gateway_rejected_requests_total",
            "Requests that the gateway rejected, by error code.",
            ["code"],
            registry=registry,
        )
        self.screening_findings = Counter(
            "octollm_screening_findings_total",
            "Submissions in which the input guardrail found a pattern.",
            ["pattern"],
            registry=registry,
        )
        self.rejected_tokens = Counter(
            "octollm_capability_tokens_rejected_total",
            "Capability tokens that were rejected, by the rule that they violated.",
            ["service", "reason"],
            registry=registry,
        )
        self.sandbox_runs = Counter(
            "octollm_sandbox_runs_total",
            "Runs in the sandbox, by outcome.",
            ["language", "outcome"],
            registry=registry,
        )
        self.limiter_queue = Histogram(
            "octollm_limiter_queue_seconds",
            "Seconds in the queue of a concurrency limiter that had no slot free, by outcome.",
            ["service", "limiter", "outcome"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.cache_lookups = Counter(
            "octollm_cache_lookups_total",
            "Look-ups in the cache of reads, by level (`l1` in process, `l2` in Redis) and outcome (`hit`, `miss`).",
            ["service", "level", "outcome"],
            registry=registry,
        )
        self.cache_invalidations = Counter(
            "octollm_cache_invalidations_total",
            "Invalidations of cached reads: `sent`, or `delayed` because Redis did not answer.",
            ["service", "outcome"],
            registry=registry,
        )
        self.spans = Counter(
            "octollm_spans_total",
            "Spans that were exported, or dropped when the buffer was full.",
            ["to", "outcome"],
            registry=registry,
        )

    def report_outbox(self, read: Callable[[], tuple[float, float, bool]]) -> None:
        """Report what ``read`` returns at each scrape: the lag in events and seconds, and whether it is the leader."""
        self.outbox_lag.set_function(lambda: read()[0])
        self.outbox_lag_seconds.set_function(lambda: read()[1])
        self.outbox_leader.set_function(lambda: float(read()[2]))

    def queue_observer(self, limiter: str) -> Callable[[str, float], None]:
        """Return the metrics hook of a concurrency limiter: it records the outcome and the seconds in the queue."""

        def observe(outcome: str, seconds: float) -> None:
            self.limiter_queue.labels(self.service, limiter, outcome).observe(seconds)

        return observe

    def text(self) -> bytes:
        """Return all metrics in the text exposition format."""
        return generate_latest(self.registry)
