"""Redis Cluster and Redis behind Sentinel: their URLs, and clients that follow a failover.

``redis+cluster://user:password@host1:7000,host2:7001`` names some nodes of a cluster, which tell the others.
``redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0`` names sentinels, the monitored master and the
database; ``?sentinel_username=…&sentinel_password=…`` is for the sentinels themselves. ``rediss+`` is TLS everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from octollm.errors import SettingError

CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
DEFAULT_PORTS = {"cluster": 6379, "sentinel": 26379}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """What a URL says. ``hosts`` are those of nodes or sentinels; ``master`` and ``database`` only with Sentinel."""

    tls: bool
    hosts: tuple[tuple[str, int], ...]
    username: str | None = None
    password: str | None = None
    master: str = ""
    database: int = 0
    sentinel_username: str | None = None
    sentinel_password: str | None = None


def parse_address(url: str) -> RedisAddress:
    """Return what a ``redis+cluster`` or ``redis+sentinel`` URL says. Raises :class:`SettingError`."""
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    path = [unquote(part) for part in parts.path.split("/") if part]
    query = parse_qs(parts.query)
    addresses = tuple(_parse_host(host, DEFAULT_PORTS[kind]) for host in hosts.split(",") if host)
    if not addresses:
        raise SettingError(f"The Redis URL names no host; write {parts.scheme}://host1:{DEFAULT_PORTS[kind]},host2:….")
    master, database = "", "0"
    if kind == "sentinel":
        if not 1 <= len(path) <= 2 or not path[-1 if len(path) == 2 else 0]:
            raise SettingError(f"The Redis URL names no master; write {parts.scheme}://host:26379/mymaster/0.")
        master, database = path[0], path[1] if len(path) == 2 else "0"
    elif path not in ([], ["0"]):
        raise SettingError("A Redis Cluster has only the database 0.")
    if not database.isdigit():
        raise SettingError("The database of a Redis URL is a number, e.g. redis+sentinel://host:26379/mymaster/0.")
    return RedisAddress(
        tls=scheme == "rediss",
        hosts=addresses,
        username=unquote(user) or None,
        password=unquote(password) or None,
        master=master,
        database=int(database),
        sentinel_username=query.get("sentinel_username", [None])[-1],
        sentinel_password=query.get("sentinel_password", [None])[-1],
    )


def _parse_host(text: str, default_port: int) -> tuple[str, int]:
    # An IPv6 address stands in brackets, as in any URL.
    host, separator, port = text.rpartition(":")
    if not separator or port.endswith("]"):
        host, port = text, str(default_port)
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        # Not the text itself: a wrong place of `@` would put the password there.
        raise SettingError("A host of the Redis URL is malformed; write host:port, several separated by commas.")
    return host.strip("[]"), int(port)


def open_sentinels(address: RedisAddress, **options: Any) -> Any:
    """Return the clients of the sentinels, which the caller closes."""
    own = {"username": address.sentinel_username, "password": address.sentinel_password}
    return Sentinel(address.hosts, sentinel_kwargs={**options, **own, "ssl": address.tls})


def connect_to_master(sentinel: Any, address: RedisAddress, *, connections: int, retries: int, **options: Any) -> Any:
    """Return a client of the present master. Each new connection asks the sentinels which one that is."""
    return sentinel.master_for(
        address.master,
        redis_class=Redis,
        db=address.database,
        username=address.username,
        password=address.password,
        ssl=address.tls,
        max_connections=connections,
        retry=Retry(NoBackoff(), retries),
        **options,
    )


class ClusterNodes:
    """The nodes of a cluster: one client for commands on keys, and one for each node that channels go through.

    A cluster passes a message on to every node, so any node serves to publish and to subscribe. Messages keep their
    order only through the same node, so publishing stays with one until it fails.
    """

    def __init__(self, address: RedisAddress, *, connections: int, **options: Any) -> None:
        self._address = address
        self._connections = connections
        self._options: dict[str, Any] = {
            **options,
            "username": address.username,
            "password": address.password,
            "ssl": address.tls,
        }
        self._channels: dict[tuple[str, int], Any] = {}
        self._publishing_at: tuple[str, int] | None = None
        self._turn = 0
        cluster: Any = RedisCluster
        self.commands: Any = cluster(
            startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
            max_connections=connections,
            # Channels and streams work while some slots are not served.
            require_full_coverage=False,
            retry=Retry(NoBackoff(), 1),
            **self._options,
        )

    def _known(self) -> Sequence[tuple[str, int]]:
        found: list[tuple[str, int]] = [(node.host, int(node.port)) for node in self.commands.get_nodes()]
        return found or self._address.hosts

    def next_node(self) -> tuple[str, int]:
        """Return a node, another one at each call."""
        nodes = self._known()
        self._turn += 1
        return nodes[self._turn % len(nodes)]

    def client(self, node: tuple[str, int]) -> Any:
        """Return the client for channels through ``node``."""
        if node not in self._channels:
            plain: Any = Redis
            self._channels[node] = plain(
                host=node[0],
                port=node[1],
                max_connections=self._connections,
                retry=Retry(NoBackoff(), 0),
                **self._options,
            )
        return self._channels[node]

    def publishing_client(self) -> Any:
        """Return the client that messages are published with."""
        if self._publishing_at is None:
            self._publishing_at = self.next_node()
        return self.client(self._publishing_at)

    def report_failure(self) -> None:
        """Publish through another node from now on."""
        self._publishing_at = None

    async def refresh(self) -> None:
        """Learn the nodes of the cluster, from any that answers. Raises redis-py's errors."""
        if not self.commands.get_nodes():
            await self.commands.initialize()

    async def close(self) -> None:
        """Close every connection."""
        await self.commands.aclose()
        for client in self._channels.values():
            await client.aclose()


CONNECTION_ERRORS = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ClusterDownError, OSError)
"""After one of these, another node is tried."""
