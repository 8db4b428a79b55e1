"""Two hosts for every service, found by the names of a cluster: ``http://coder-arm:8102`` is whoever DNS says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from namespace import Zone, add_address, in_namespace
from redis_process import RedisProcess
from spread import Replica, Spread
from two_of_each import GOALS, completed
from whole import answers

from octollm.contracts.services import SERVICES
from octollm.testing import wait_until
from octollm.testing.fake_model import scripted_model

pytestmark = [pytest.mark.sandbox, pytest.mark.redis, pytest.mark.timeout(300)]


def test_goals_complete_behind_names_while_their_addresses_change(tmp_path: Path) -> None:
    in_namespace("test_dns_names:behind_names", str(tmp_path))


async def behind_names(folder: str) -> None:
    """Run two of each on hosts of their own, then replace one of the coder's two hosts by a third."""
    zone = Zone()
    for number, info in enumerate(SERVICES.values()):
        zone.names[info.host] = [f"10.77.1.{number + 1}", f"10.77.2.{number + 1}"]
    root = Path(folder)
    redis = RedisProcess(root)
    redis.start()
    spread = _Hosts(root / "spread", zone)
    try:
        async with zone.served(), scripted_model(answers) as model:
            spread.environment |= {
                "OCTOLLM_MODEL": "openai:scripted",
                "OCTOLLM_MODEL_URL": model.url,
                "OCTOLLM_REDIS_URL": redis.url,
                "OCTOLLM_ALLOWED_HOSTS": ",".join(address for pair in zone.names.values() for address in pair),
            }
            spread.place()
            await spread.start()
            await _all_complete(spread)
            first, second = spread.replicas["coder"]
            assert _served(first) + _served(second) >= 1, "a host of the name was called"
            await _replace(spread, zone, first)
    finally:
        await asyncio.gather(*(replica.kill() for replica in spread.all()))
        redis.kill()


async def _replace(spread: _Hosts, zone: Zone, gone: Replica) -> None:
    """Take a coder's host out of DNS and put a new one in, without restarting anything else."""
    (stays,) = (replica for replica in spread.replicas["coder"] if replica is not gone)
    new = spread.host("coder", "10.77.3.1")
    await new.start()
    await new.ready()
    zone.names["coder-arm"] = [stays.address, new.address]
    await gone.kill()
    await stays.kill()

    async def new_one_works() -> bool:
        await _all_complete(spread)
        return _served(new) > 0

    await wait_until(new_one_works, description="the new host of coder-arm is called", timeout=60)


async def _all_complete(spread: Spread) -> None:
    done = await asyncio.gather(*(completed(spread, goal, files) for goal, files in GOALS))
    for task in done:
        assert task["status"] == "completed", (task["goal"], task["error"], spread.logs())


def _served(replica: Replica) -> int:
    return replica.log.read_text().count('"operation":"execute","status":200')


class _Hosts(Spread):
    """An installation whose services have hosts of their own, at the services' own ports."""

    def __init__(self, folder: Path, zone: Zone) -> None:
        super().__init__(folder, {})
        self.folder = folder
        self.zone = zone
        self.replicas = {}
        for name in [name for name in self.environment if name.endswith("_URL") and name.startswith("OCTOLLM_")]:
            del self.environment[name]
        del self.environment["OCTOLLM_PORT_OFFSET"]

    def place(self) -> None:
        for name, info in SERVICES.items():
            for address in self.zone.names[info.host]:
                self.host(name, address)

    def host(self, name: str, address: str) -> Replica:
        add_address(address)
        log = self.folder / f"{name}-{address}.log"
        replica = Replica(name, SERVICES[name].port, self.environment, log, address=address)
        self.replicas.setdefault(name, []).append(replica)
        return replica
