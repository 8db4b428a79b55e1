"""Every instrument of a service, in the Prometheus exposition format on ``/metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import generate_latest

from octollm.telemetry.tally import RequestMetrics


class Metrics:
    """The instruments of one service, in a registry of its own (several services may share a process)."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry(auto_describe=False)
        registry = self.registry
        self.requests = RequestMetrics(service, registry)
        self.calls = Counter(
            "octollm_calls_total",
            "Calls to other services, by how they ended (a status or an error code).",
            ["service", "target", "operation", "outcome"],
            registry=registry,
        )
        self.call_retries = Counter(
            "octollm_call_retries_total",
            "Calls that were tried again.",
            ["service", "target"],
            registry=registry,
        )
        self.ejections = Counter(
            "octollm_ejections_total",
            "Instances of other services that were taken out of use for a while, by why.",
            ["service", "target", "reason"],
            registry=registry,
        )
        self.tasks = Counter("octollm_tasks_total", "Tasks that ended, by status.", ["status"], registry=registry)
        self.tasks_running = Gauge("octollm_tasks_running", "Tasks that this process works on.", registry=registry)
        self.tokens = Counter(
            "octollm_model_tokens_total",
            "Tokens that models read (prompt) and wrote (completion).",
            ["model", "kind"],
            registry=registry,
        )
        self.events = Counter("octollm_events_total", "Events that were published.", ["event_type"], registry=registry)
        self.live_connections = Gauge("octollm_watchers", "Open live connections.", ["kind"], registry=registry)
        self.rejected_requests = Counter(
            "octollm_door_refused_total",
            "Requests that the public door refused, by error code.",
            ["code"],
            registry=registry,
        )
        self.screening_findings = Counter(
            "octollm_screening_findings_total",
            "Submissions in which a pattern was found.",
            ["pattern"],
            registry=registry,
        )
        self.rejected_tokens = Counter(
            "octollm_tokens_refused_total",
            "Capability tokens that were refused, by the rule that they broke.",
            ["service", "reason"],
            registry=registry,
        )
        self.sandbox_runs = Counter(
            "octollm_sandbox_runs_total",
            "Runs in the sandbox, by outcome.",
            ["language", "outcome"],
            registry=registry,
        )
        self.spans = Counter(
            "octollm_spans_total",
            "Spans that were exported, or dropped because nobody took them in time.",
            ["to", "outcome"],
            registry=registry,
        )

    def text(self) -> bytes:
        """Return the exposition."""
        return generate_latest(self.registry)
