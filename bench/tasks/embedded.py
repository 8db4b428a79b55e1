"""Serves an embedded installation with the benchmark's planner and arm, as `octollm up --arm` does."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import uvloop

from octollm.client import connect
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import read_settings
from octollm.contracts.services import SERVICES
from octollm.installation.arm_host import serve_arm
from octollm.installation.embedded import embedded_installation
from octollm.installation.service_host import tune_garbage_collector
from octollm.installation.services import ServiceFactory
from octollm.services.arms.judge.service import judge_service
from tasks.parts import arm, fixed_planner


async def main() -> None:
    clock = SystemClock()
    ids = Uuid7Generator(clock)
    settings = read_settings(os.environ, tuple(SERVICES))
    # The model is never asked: the judge has the rules alone, as with the embedded model.
    overrides: dict[str, ServiceFactory] = {
        "planner": fixed_planner,
        "judge": lambda base, own: judge_service(base, replace(own, model="embedded")),
    }
    async with embedded_installation(settings, clock=clock, ids=ids, overrides=overrides) as system:
        await system.wait_ready()
        async with connect(system.gateway_url, system.local_key) as client:
            token = await client.admin.create_enrolment_token(arm.name, calls=(), lifetime_seconds=600)
        own = replace(
            settings,
            service_urls={name: (url,) for name, url in system.urls.items()},
            enrolment_token=token.secret,
            shutdown_grace=0.5,
        )
        async with serve_arm(arm, own, system.http, clock=clock, ids=ids, on_wait=lambda _names: None):
            tune_garbage_collector()
            print("up", flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
