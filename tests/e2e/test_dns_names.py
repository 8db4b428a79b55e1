"""Two hosts for every service, found by the names of a cluster: ``http://coder-arm:8102`` is whoever DNS says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from namespace import Zone, add_address, in_namespace
from process_installation import GOALS, ProcessInstallation, ServiceProcess, complete_goal
from redis_process import RedisProcess
from scripts import default_reply

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
    installation = _Hosts(root / "installation", zone)
    try:
        async with zone.served(), scripted_model(default_reply) as model:
            installation.environment |= {
                "OCTOLLM_MODEL": "openai:scripted",
                "OCTOLLM_MODEL_URL": model.url,
                "OCTOLLM_REDIS_URL": redis.url,
                "OCTOLLM_ALLOWED_HOSTS": ",".join(address for pair in zone.names.values() for address in pair),
            }
            installation.place()
            await installation.start()
            await _all_complete(installation)
            first, second = installation.replicas["coder"]
            assert _served(first) + _served(second) >= 1, "a host of the name was called"
            await _replace(installation, zone, first)
    finally:
        await asyncio.gather(*(replica.kill() for replica in installation.all()))
        redis.kill()


async def _replace(installation: _Hosts, zone: Zone, gone: ServiceProcess) -> None:
    """Take a coder's host out of DNS and put a new one in, without restarting anything else."""
    (stays,) = (replica for replica in installation.replicas["coder"] if replica is not gone)
    new = installation.host("coder", "10.77.3.1")
    await new.start()
    await new.ready()
    zone.names["coder-arm"] = [stays.address, new.address]
    await gone.kill()
    await stays.kill()

    async def is_new_host_called() -> bool:
        await _all_complete(installation)
        return _served(new) > 0

    await wait_until(is_new_host_called, description="the new host of coder-arm is called", timeout=60)


async def _all_complete(installation: ProcessInstallation) -> None:
    done = await asyncio.gather(*(complete_goal(installation, goal, files) for goal, files in GOALS))
    for task in done:
        assert task["status"] == "completed", (task["goal"], task["error"], installation.logs())


def _served(replica: ServiceProcess) -> int:
    return replica.log.read_text().count('"operation":"execute","status":200')


class _Hosts(ProcessInstallation):
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

    def host(self, name: str, address: str) -> ServiceProcess:
        add_address(address)
        log = self.folder / f"{name}-{address}.log"
        replica = ServiceProcess(name, SERVICES[name].port, self.environment, log, address=address)
        self.replicas.setdefault(name, []).append(replica)
        return replica
