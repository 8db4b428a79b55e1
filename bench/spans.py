"""The cost of tracing: authenticated calls per second with and without spans, and the cost of one span alone.

    .venv/bin/python bench/spans.py

Two services on real sockets in one process, 16 calls in flight, two spans per call. Rounds alternate between the modes,
so that other load on the machine affects all of them; ratios are of the medians. "With spans" is the cost for a service
whose monitor runs in another process; in an embedded installation the monitor's work adds to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from octollm.clock import SystemClock
from octollm.context import RequestContext, set_context, start_trace
from octollm.resilience import Deadline
from octollm.rpc.auth import RegisteredServiceAuthenticator
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.client import CallTarget, OutgoingCall
from octollm.rpc.exporter import BatchExporter, create_monitor_sender
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.monitor.service import TraceHandlers
from octollm.services.monitor.span_store import SpanStore
from octollm.storage import open_database
from octollm.storage.migrations import migrate
from octollm.telemetry import Span, Tracer, configure_logging
from octollm.telemetry.otlp import encode_spans
from octollm.testing.harness import Harness, start_harness

IN_FLIGHT = 16
CALLS = 1600
ROUNDS = 7


@contextlib.asynccontextmanager
async def judge(base: ServiceBase, caller: ServiceBase) -> AsyncGenerator[Service]:
    # Caller and callee share a buffer, so that one exporter sends the spans of both.
    base = dataclasses.replace(base, tracer=Tracer(base.name, base.clock, caller.spans))

    async def validate(_call: IncomingCall, _body: bytes) -> dict[str, bool]:
        return {"is_valid": True}

    yield build_service(
        base, [Operation("validate", "POST", "/validate", validate, scope="judge:validate", body=bytes)]
    )


@contextlib.asynccontextmanager
async def monitor(base: ServiceBase) -> AsyncGenerator[Service]:
    async with open_database("memory://", clock=base.clock) as db:
        await migrate(db, "monitor")
        authenticator = RegisteredServiceAuthenticator(base.name, base.directory, base.clock)
        operations = TraceHandlers(SpanStore(db), None).operations()
        yield build_service(base, operations, authenticators={"service": authenticator})


async def run_round(harness: Harness, base: ServiceBase, *, sampled: bool) -> float:
    """Return calls per second."""
    token = harness.token("judge:validate")
    target = CallTarget("judge", "judge.validate", "POST", "/validate", "read_only")
    set_context(
        RequestContext("coder", trace=start_trace(sampled=sampled), task_id="task-" + "0" * 32, tenant="default")
    )

    async def call_repeatedly() -> None:
        for _ in range(CALLS // IN_FLIGHT):
            await base.client.send(OutgoingCall(target, token, Deadline.after(base.clock, 30), b'{"code": "x = 1"}'))

    began = time.perf_counter()
    await asyncio.gather(*(call_repeatedly() for _ in range(IN_FLIGHT)))
    return CALLS / (time.perf_counter() - began)


def measure_span(base: ServiceBase) -> float:
    """Return the microseconds that one span takes."""
    set_context(RequestContext("coder", trace=start_trace(sampled=True), task_id="task-1", tenant="default"))
    began = time.perf_counter()
    for _ in range(20_000):
        base.tracer.end(base.tracer.start("work"))
    microseconds = (time.perf_counter() - began) / 20_000 * 1e6
    base.spans.take(10**6)
    return microseconds


async def encode_only(spans: list[Span]) -> None:
    """Encode spans as a service does whose monitor runs elsewhere, without the one request per 512 spans."""
    encode_spans(spans, "bench")


async def main() -> None:
    async with start_harness() as harness:
        base = harness.base("coder")
        send_to_monitor = create_monitor_sender(base.client, base.identity.signer(), base.clock)
        modes = {"without spans": None, "with spans": encode_only, "with the monitor here too": send_to_monitor}
        samples: dict[str, list[float]] = {mode: [] for mode in modes}
        async with harness.serve(monitor(harness.base("monitor"))), harness.serve(judge(harness.base("judge"), base)):
            for number in range(ROUNDS + 1):
                for mode, send in modes.items():
                    exporter = BatchExporter(
                        base.spans, send or encode_only, name="monitor", log=base.log, metrics=base.metrics
                    )
                    async with exporter.run():
                        rate = await run_round(harness, base, sampled=send is not None)
                    if number:  # the first round is the warm-up
                        samples[mode].append(rate)
        print(f"one span                    {measure_span(base):8.1f} µs")
        rates = {mode: statistics.median(values) for mode, values in samples.items()}
        for mode, rate in rates.items():
            print(f"{mode:<26}  {rate:8.0f} calls/s  {rate / rates['without spans']:.2f}")


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder,
        configure_logging(Path(folder) / "log", level="info", clock=SystemClock()),
    ):
        asyncio.run(main())
