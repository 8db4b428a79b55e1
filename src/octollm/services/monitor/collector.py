"""Handing every span on to a collector outside, where the settings name one. Only the monitor holds its credential."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from octollm import __version__
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.rpc.exporting import SEND_SECONDS, Exporter, Send
from octollm.rpc.health import CheckUp
from octollm.rpc.http import Http
from octollm.rpc.outside import outside_http
from octollm.rpc.service import Base
from octollm.telemetry import Buffer, Span
from octollm.telemetry.otlp import encode_spans

_RETRIED = frozenset({408, 429, 502, 503, 504})
"""Answers after which OTLP over HTTP has the same batch sent again."""


@dataclass(frozen=True, slots=True)
class Forwarding:
    """What is forwarded: put it into ``buffer``."""

    buffer: Buffer[Span]
    checkup: CheckUp


@contextlib.asynccontextmanager
async def forwarding(base: Base, settings: Settings) -> AsyncGenerator[Forwarding | None]:
    """Forward in the background for as long as the context is open; ``None`` where no collector is named."""
    if settings.otlp_url is None:
        yield None
        return
    buffer = Buffer[Span]()
    async with outside_http(idle=SEND_SECONDS) as http:
        send = to_collector(http, settings.otlp_url, settings.otlp_headers)
        exporter = Exporter(buffer, send, name="collector", log=base.log, metrics=base.metrics)
        async with exporter.running():
            yield Forwarding(buffer, exporter.checkup)


def to_collector(http: Http, url: str, headers: tuple[tuple[str, str], ...]) -> Send[Span]:
    """Return what sends spans to the collector at ``url`` (OTLP over HTTP, in JSON)."""

    async def send(spans: list[Span]) -> None:
        sent = {"Content-Type": "application/json", **dict(headers)}
        body = encode_spans(spans, __version__)
        answer = await http.send("POST", f"{url}/v1/traces", sent, body, seconds=SEND_SECONDS)
        if answer.status >= 300:
            raise OctoError(
                f"It answers {answer.status}; see OCTOLLM_OTLP_URL and OCTOLLM_OTLP_HEADERS.",
                code="unavailable" if answer.status in _RETRIED else "peer_protocol",
            )

    return send
