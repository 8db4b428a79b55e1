"""Numbers quoted in the docs are those of the code: the phrase, with the constant put in, has to stand on the page."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"

KIB = 1024
MIB = 1024 * 1024
DAY = 86_400

QUOTED: list[tuple[str, str, str, float]] = [
    # page, phrase, constant, and the unit that the phrase counts in
    ("concepts/calls.md", "A URL may have {} KiB", "rpc.http1_parser.MAX_URL_BYTES", KIB),
    ("concepts/calls.md", "A header block may have {} KiB", "rpc.http1_parser.MAX_HEADER_BYTES", KIB),
    ("concepts/calls.md", "discards up to {} MiB of", "rpc.http1_exchange.MAX_DISCARDED_BYTES", 1024 * KIB),
    ("concepts/calls.md", "of the body for up to {} s, so", "rpc.http1_server.MAX_DISCARD_SECONDS", 1),
    ("concepts/calls.md", "must arrive within {} s (408)", "rpc.http1_server.HEADER_SECONDS", 1),
    ("concepts/calls.md", "A body must arrive within {} s", "rpc.codec.BODY_SECONDS", 1),
    ("concepts/calls.md", "1 to {} printable ASCII characters", "rpc.idempotency.MAX_KEY", 1),
    ("concepts/calls.md", "compressed responses from {} KiB", "rpc.responses.MIN_COMPRESSED_BYTES", KIB),
    ("concepts/calls.md", "`connect_timeout` ({} s)", "rpc.http_client.CONNECT_SECONDS", 1),
    ("concepts/calls.md", "connections to a host were busy for {} s", "rpc.http_client.POOL_SECONDS", 1),
    ("concepts/calls.md", "{} connections to a host", "rpc.http_client.MAX_CONNECTIONS", 1),
    ("concepts/calls.md", "no byte accepted for {} s", "rpc.http_client.WRITE_SECONDS", 1),
    ("concepts/calls.md", "`read_timeout` ({} s of silence)", "rpc.http_client.READ_SECONDS", 1),
    ("concepts/calls.md", "more wait for at most {} s", "rpc.server.MAX_QUEUE_SECONDS", 1),
    ("concepts/calls.md", "stored for a day, up to {} MiB", "rpc.idempotency.MAX_STORED_BYTES", MIB),
    ("concepts/calls.md", "died; its lease of {} s has expired", "rpc.idempotency.LEASE_SECONDS", 1),
    ("concepts/calls.md", "(between {} and", "rpc.discovery.MIN_TTL", 1),
    ("concepts/calls.md", "and {} s). The address", "rpc.discovery.MAX_TTL", 1),
    ("concepts/capabilities.md", "at most {} KiB and eight parts", "capability.tokens.MAX_BEARER_CHARS", KIB),
    ("concepts/capabilities.md", "Clocks may differ by {} s", "capability.tokens.SKEW_SECONDS", 1),
    ("concepts/capabilities.md", "made for one call lives {} s", "capability.minting.CALL_TOKEN_SECONDS", 1),
    ("concepts/capabilities.md", "Without news for {} s it serves only", "rpc.revocations.STALE_SECONDS", 1),
    ("concepts/tasks.md", "a **lease** of {} s", "tasks.leases.LEASE_SECONDS", 1),
    ("concepts/tasks.md", "renews the lease every {} s", "tasks.leases.RENEW_SECONDS", 1),
    ("concepts/tasks.md", "could not renew for {} s", "tasks.leases.RENEW_DEADLINE_SECONDS", 1),
    ("concepts/event-log.md", "more than {} KiB of data", "contracts.events.MAX_EVENT_BYTES", KIB),
    ("concepts/event-log.md", "its queue of {}", "events.bus.QUEUE_CAPACITY", 1),
    ("concepts/live-updates.md", "{:,} entries per task", "storage.keys.TEXT_MAX_ENTRIES", 1),
    ("concepts/live-updates.md", "the first {:,} code points", "tasks.live_text.MAX_STEP_TEXT", 1),
    ("concepts/models.md", "a provider {}. Further calls", "services.models.service.REMOTE_PARALLEL", 1),
    ("concepts/models.md", "not be written within {} s", "services.models.completion.JOURNAL_SECONDS", 1),
    ("concepts/storage.md", "at\nmost {} connections for commands", "storage.redis.MAX_CONNECTIONS", 1),
    ("concepts/storage.md", "and {} for subscriptions", "storage.redis.MAX_LISTENERS", 1),
    ("concepts/storage.md", "A statement may run {} s", "storage.engines.STATEMENT_SECONDS", 1),
    ("concepts/storage.md", "may wait {} s for a lock", "storage.engines.LOCK_SECONDS", 1),
    ("concepts/storage.md", "there are {:,} newer ones", "services.monitor.span_store.MAX_STORED_SPANS", 1),
    ("concepts/telemetry.md", "spans beyond {} are dropped", "telemetry.spans.MAX_BUFFERED_SPANS", 1),
    ("concepts/telemetry.md", "up to {} s late", "telemetry.logs.FLUSH_SECONDS", 1),
    ("concepts/telemetry.md", "every service every {} s", "services.monitor.health.POLL_SECONDS", 1),
    ("errors.md", "an `Idempotency-Key` that does not have 1 to {} printable", "rpc.idempotency.MAX_KEY", 1),
    ("errors.md", "more than {:,} characters. Attach", "contracts.task.MAX_GOAL", 1),
    ("errors.md", "has more than {} MiB, or has an unsupported type", "contracts.task.MAX_FILE_BYTES", MIB),
    ("errors.md", "more than {} KiB together. Send long", "rpc.http1_parser.MAX_URL_BYTES", KIB),
    ("errors.md", "All {} connections to a service", "rpc.http_client.MAX_CONNECTIONS", 1),
    ("events.md", "sent no heartbeat for {} s", "services.orchestrator.instances.HEARTBEAT_TIMEOUT_SECONDS", 1),
    ("quickstart.md", "A file may have {} MiB", "contracts.task.MAX_FILE_BYTES", MIB),
    ("traces.md", "The buffer holds {} spans", "telemetry.spans.MAX_BUFFERED_SPANS", 1),
    ("traces.md", "newest {:,} spans", "services.monitor.span_store.MAX_STORED_SPANS", 1),
    ("security.md", "Without news for {} s, `/ready`", "rpc.revocations.LATE_SECONDS", 1),
    ("security.md", "The clock skew is {} s", "services.orchestrator.oidc.CLOCK_SKEW_SECONDS", 1),
]


@pytest.mark.parametrize(("page", "phrase", "constant", "unit"), QUOTED, ids=lambda value: str(value)[:60])
def test_a_number_on_a_page_is_that_of_the_code(page: str, phrase: str, constant: str, unit: float) -> None:
    module, _, name = constant.rpartition(".")
    value = getattr(import_module(f"octollm.{module}"), name) / unit
    number = int(value) if value == int(value) else value
    quoted = re.sub(r"\s+", " ", phrase.format(number))
    assert quoted in re.sub(r"\s+", " ", (DOCS / page).read_text(encoding="utf-8"))
