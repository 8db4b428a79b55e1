"""Handing every span on to a collector outside, where the settings name one. Only the monitor holds its credential."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from octollm import __version__
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.rpc.exporting import SEND_SECONDS, BatchExporter, SendBatch
from octollm.rpc.health import ReadinessCheck
from octollm.rpc.http import HttpClient
from octollm.rpc.outside import create_external_http_client
from octollm.rpc.service import ServiceBase
from octollm.telemetry import ExportBuffer, Span
from octollm.telemetry.otlp import encode_spans

_RETRYABLE_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Answers after which OTLP over HTTP has the same batch sent again."""


@dataclass(frozen=True, slots=True)
class SpanExport:
    """What is forwarded: put it into ``buffer``."""

    buffer: ExportBuffer[Span]
    checkup: ReadinessCheck


@contextlib.asynccontextmanager
async def run_span_export(base: ServiceBase, settings: Settings) -> AsyncGenerator[SpanExport | None]:
    """Forward in the background for as long as the context is open; ``None`` where no collector is named."""
    if settings.otlp_endpoint is None:
        yield None
        return
    buffer = ExportBuffer[Span]()
    async with create_external_http_client(read_timeout=SEND_SECONDS) as http:
        send = build_collector_sender(http, settings.otlp_endpoint, settings.otlp_headers)
        exporter = BatchExporter(buffer, send, name="collector", log=base.log, metrics=base.metrics)
        async with exporter.run():
            yield SpanExport(buffer, exporter.check_readiness)


def build_collector_sender(http: HttpClient, url: str, headers: tuple[tuple[str, str], ...]) -> SendBatch[Span]:
    """Return what sends spans to the collector at ``url`` (OTLP over HTTP, in JSON)."""

    async def send(spans: list[Span]) -> None:
        sent = {"Content-Type": "application/json", **dict(headers)}
        body = encode_spans(spans, __version__)
        answer = await http.send("POST", f"{url}/v1/traces", sent, body, seconds=SEND_SECONDS)
        if answer.status >= 300:
            raise OctoError(
                f"It answers {answer.status}; see OCTOLLM_OTLP_URL and OCTOLLM_OTLP_HEADERS.",
                code="unavailable" if answer.status in _RETRYABLE_STATUSES else "peer_protocol",
            )

    return send
