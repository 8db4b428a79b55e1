"""What spans cost: secured calls per second with and without them, in one run, and what one span costs alone.

    .venv/bin/python bench/spans.py

Two services on real sockets of one process; 16 calls in flight, each leaving two spans. Rounds take turns, so that
whatever else the machine does meets all; the ratios are those of the medians. "With spans" is what a service pays whose
monitor runs in a process of its own; embedded, the monitor's work is in the same process.
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
    # Caller and callee share a buffer, so that one exporter does the work of both.
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
        opener = RegisteredServiceAuthenticator(base.name, base.directory, base.clock)
        yield build_service(base, TraceHandlers(SpanStore(db), None).operations(), authenticators={"service": opener})


async def round_of(house: Harness, base: ServiceBase, *, sampled: bool) -> float:
    """Return calls per second."""
    token = house.token("judge:validate")
    target = CallTarget("judge", "judge.validate", "POST", "/validate", "read_only")
    set_context(
        RequestContext("coder", trace=start_trace(sampled=sampled), task_id="task-" + "0" * 32, tenant="default")
    )

    async def some() -> None:
        for _ in range(CALLS // IN_FLIGHT):
            await base.client.send(OutgoingCall(target, token, Deadline.after(base.clock, 30), b'{"code": "x = 1"}'))

    began = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(IN_FLIGHT)))
    return CALLS / (time.perf_counter() - began)


def one_span(base: ServiceBase) -> float:
    """Return the microseconds of one span, alone."""
    set_context(RequestContext("coder", trace=start_trace(sampled=True), task_id="task-1", tenant="default"))
    began = time.perf_counter()
    for _ in range(20_000):
        base.tracer.end(base.tracer.start("work"))
    taken = (time.perf_counter() - began) / 20_000 * 1e6
    base.spans.take(10**6)
    return taken


async def encoded_only(spans: list[Span]) -> None:
    """Do what a service does whose monitor runs elsewhere, but for one request in 512 spans."""
    encode_spans(spans, "bench")


async def main() -> None:
    async with start_harness() as house:
        base = house.base("coder")
        to_here = create_monitor_sender(base.client, base.identity.signer(), base.clock)
        modes = {"without spans": None, "with spans": encoded_only, "with the monitor here too": to_here}
        found: dict[str, list[float]] = {mode: [] for mode in modes}
        async with house.serve(monitor(house.base("monitor"))), house.serve(judge(house.base("judge"), base)):
            for number in range(ROUNDS + 1):
                for mode, send in modes.items():
                    exporter = BatchExporter(
                        base.spans, send or encoded_only, name="monitor", log=base.log, metrics=base.metrics
                    )
                    async with exporter.run():
                        rate = await round_of(house, base, sampled=send is not None)
                    if number:  # the first warms up
                        found[mode].append(rate)
        print(f"one span                    {one_span(base):8.1f} µs")
        rates = {mode: statistics.median(each) for mode, each in found.items()}
        for mode, rate in rates.items():
            print(f"{mode:<26}  {rate:8.0f} calls/s  {rate / rates['without spans']:.2f}")


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder,
        configure_logging(Path(folder) / "log", level="info", clock=SystemClock()),
    ):
        asyncio.run(main())
