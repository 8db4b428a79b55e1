"""The event sink against private NATS servers, checked by a client that has nothing of ours against the log's rows."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import nats
import nats.js.api
import nkeys
import pytest
import structlog
import trustme
from databases import Backend
from nats_process import NatsProcess, StoredMessage, read_stream
from orchestrator_kit import Script, orchestrator_kit
from sqlalchemy import delete, select, update

from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import EventSinkUrl
from octollm.config.parsing import parse_event_sink
from octollm.contracts.event_formats import encode_cloudevent
from octollm.errors import OctoError, SettingError
from octollm.events import EventDraft, EventLog, LogTail, OutboxPolicy, OutboxPublisher, SubscriptionStore
from octollm.events.pubsub import close_pubsub
from octollm.rpc.tls import external_context
from octollm.services.orchestrator.event_sink import EventSink, SinkPosition, read_sink_position
from octollm.services.orchestrator.jetstream import JetStreamSink, covers_events
from octollm.services.orchestrator.retention import lowest_needed_position
from octollm.storage import Database, RedisClient, RedisKeys, open_database, open_redis
from octollm.storage.migrations import migrate
from octollm.storage.tables import events, relay_state
from octollm.telemetry import Metrics
from octollm.testing import wait_until

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
SUBJECTS = 7


@dataclass
class Feeder:
    """A log with its publisher, and sinks as replicas of the orchestrator have them."""

    db: Database
    log: EventLog
    tail: LogTail
    redis: RedisClient
    keys: RedisKeys
    metrics: Metrics = field(default_factory=lambda: Metrics("orchestrator"))
    written: int = 0

    async def write(self, count: int = 1, *, tenant: str = "acme") -> None:
        """Write events of several subjects, ten in a transaction."""
        for _ in range(0, count, 10):
            number = min(10, count)
            drafts = [
                EventDraft(
                    "arm.healthy", f"arm/a{(self.written + each) % SUBJECTS}", tenant, "orchestrator", {"arm": "a"}
                )
                for each in range(number)
            ]
            async with self.db.transaction() as tx:
                await self.log.append_all(tx, drafts)
            self.written += number
            count -= number

    def target(self, url: str, credentials: Path | None = None, ca: Path | None = None) -> JetStreamSink:
        return JetStreamSink(_parsed(url), credentials, external_context(ca))

    def sink(self, url: str, *, credentials: Path | None = None, ca: Path | None = None) -> EventSink:
        position = SinkPosition(self.db, self.log, IDS.hex(), _parsed(url).start)
        connect = self.target(url, credentials, ca).connect
        return EventSink(
            self.db,
            self.log,
            self.tail,
            position,
            connect,
            CLOCK,
            structlog.get_logger(),
            self.metrics,
            name="nats stream octollm",
        )

    async def caught_up(self, sink: EventSink, timeout: float = 60) -> None:
        async def is_done() -> bool:
            async with self.db.read() as connection:
                unnumbered = await connection.scalar(select(events.c.id).where(events.c.seq.is_(None)).limit(1))
            return unnumbered is None and (await sink.read_lag()).positions == 0

        await wait_until(is_done, description="the sink has everything", timeout=timeout, interval=0.05)

    async def failed(self, sink: EventSink, text: str) -> str:
        """Wait until ``/ready`` says ``text``; return all that it says."""
        seen = ""

        async def says() -> bool:
            nonlocal seen
            seen = (await sink.check_health()).detail or seen
            return text in seen

        try:
            await wait_until(says, description=text, timeout=30)
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen!r}") from error
        return seen

    async def rows(self) -> list[tuple[str, int, str, int]]:
        """Return id, position, subject and version of each event, from SQL."""
        query = select(events.c.id, events.c.seq, events.c.subject, events.c.version).order_by(events.c.seq)
        async with self.db.read() as connection:
            return [(r["id"], r["seq"], r["subject"], r["version"]) for r in await connection.all(query)]

    async def check(self, messages: list[StoredMessage]) -> None:
        """Check that the stream has exactly the log, in its order, each event once."""
        found = [(each.event["id"], *(each.event[n] for n in ("seq", "subject", "version"))) for each in messages]
        assert found == await self.rows()
        assert [each.headers["Nats-Msg-Id"] for each in messages] == [row[0] for row in found]

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("octollm_event_sink_events_total", {"outcome": outcome}) or 0.0


def _parsed(url: str) -> EventSinkUrl:
    parsed = parse_event_sink(url)
    assert parsed is not None
    return parsed


@contextlib.asynccontextmanager
async def open_feeder(database: str) -> AsyncGenerator[Feeder]:
    keys = RedisKeys()
    async with open_database(database, clock=CLOCK) as db, open_redis("memory://") as redis:
        await migrate(db, "orchestrator")
        log = EventLog(db, CLOCK, IDS)
        policy = OutboxPolicy(poll=0.05)
        async with (
            OutboxPublisher(db, log, redis, CLOCK, IDS, keys=keys, policy=policy),
            LogTail(redis, keys, log) as tail,
        ):
            yield Feeder(db, log, tail, redis, keys)


@pytest.fixture
async def on_each(backend: Backend) -> AsyncIterator[Feeder]:
    async with open_feeder(backend.url("octollm_orchestrator")) as feeder:
        yield feeder


@pytest.fixture
async def feeder() -> AsyncIterator[Feeder]:
    async with open_feeder("memory://") as feeder:
        yield feeder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsProcess]:
    process = NatsProcess(tmp_path / "nats")
    process.start()
    yield process
    process.kill()


async def test_the_stream_is_the_log_with_the_envelopes_of_redis_byte_for_byte(
    on_each: Feeder, server: NatsProcess
) -> None:
    feeder = on_each
    pubsub = feeder.redis.pubsub()
    await pubsub.subscribe(feeder.keys.channel("events:arm:healthy"))
    published: list[bytes] = []
    async with feeder.sink(server.url) as sink:
        await feeder.write(25)
        while len(published) < 25:
            message = await pubsub.receive(5)
            if message is not None and not message.subscribed:
                published.append(message.data)
        await feeder.caught_up(sink)
        status = await sink.check_health()
        assert (status.ok, status.required) == (True, False)
    await close_pubsub(pubsub)
    stored = await read_stream(server.url)
    await feeder.check(stored)
    assert [each.body for each in stored] == published
    assert {each.subject for each in stored} == {"octollm.events.acme.arm.healthy"}
    assert (feeder.count("stored"), feeder.count("duplicate")) == (25, 0)


async def test_each_tenant_has_a_subject_of_its_own(feeder: Feeder, server: NatsProcess) -> None:
    async with feeder.sink(f"{server.url}?stream=copy&subject=prod.octollm&replicas=1") as sink:
        await feeder.write(3, tenant="acme")
        await feeder.write(2, tenant="acme.eu")
        await feeder.caught_up(sink)
    one = await read_stream(server.url, "copy", "prod.octollm.acme.>")
    other = await read_stream(server.url, "copy", "prod.octollm.acme%2Eeu.>")
    assert [len(one), len(other)] == [3, 2]
    assert {each.event["tenant"] for each in one} == {"acme"}


@pytest.mark.parametrize("mode", ["structured", "binary"])
async def test_cloudevents_on_request(feeder: Feeder, server: NatsProcess, mode: Any) -> None:
    name = "cloudevents" if mode == "structured" else "cloudevents-binary"
    async with feeder.sink(f"{server.url}?format={name}") as sink:
        await feeder.write(3)
        await feeder.caught_up(sink)
    expected = [encode_cloudevent(event, mode) for event in await feeder.log.read(0, tenant=None)]
    stored = await read_stream(server.url)
    assert [each.body for each in stored] == [each.body for each in expected]
    for message, wanted in zip(stored, expected, strict=True):
        assert {name: message.headers[name] for name in wanted.headers} == wanted.headers


async def test_a_server_killed_in_the_middle_loses_doubles_and_reorders_nothing(
    on_each: Feeder, server: NatsProcess
) -> None:
    feeder = on_each
    async with feeder.sink(server.url) as sink:

        async def write() -> None:
            for _ in range(60):
                await feeder.write(50)

        writing = asyncio.create_task(write())
        for number in range(4):
            reached = 1 + number * 600
            await wait_until(lambda reached=reached: feeder.count("stored") >= reached, description="some are stored")
            server.kill()
            await feeder.failed(sink, "NATS")
            server.start()
        await writing
        await feeder.caught_up(sink)
    await feeder.check(await read_stream(server.url))


async def test_a_server_that_hangs_is_noticed_and_gets_nothing_twice(feeder: Feeder, server: NatsProcess) -> None:
    async with feeder.sink(server.url) as sink:
        await feeder.write(10)
        await feeder.caught_up(sink)
        server.pause()
        await feeder.write(200)
        await feeder.failed(sink, "acknowledged nothing")
        # What was on its way, and what is sent again, arrive together.
        server.resume()
        await feeder.caught_up(sink)
    await feeder.check(await read_stream(server.url))


async def test_without_jetstream_it_says_so_and_goes_on_when_it_is_enabled(feeder: Feeder, tmp_path: Path) -> None:
    server = NatsProcess(tmp_path / "nats", jetstream=False)
    server.start()
    try:
        async with feeder.sink(server.url) as sink:
            await feeder.write(10)
            await feeder.failed(sink, "JetStream is not enabled")
            server.kill()
            await feeder.failed(sink, "cannot be reached")
            server.enable_jetstream()
            server.start()
            await feeder.caught_up(sink)
        await feeder.check(await read_stream(server.url))
    finally:
        server.kill()


async def test_a_full_stream_stops_it_and_more_room_lets_it_go_on(feeder: Feeder, server: NatsProcess) -> None:
    config = nats.js.api.StreamConfig(
        "octollm", subjects=["octollm.events.>"], max_msgs=20, discard=nats.js.api.DiscardPolicy.NEW
    )
    await _manage(server.url, lambda jetstream: jetstream.add_stream(config))
    async with feeder.sink(server.url) as sink:
        await feeder.write(100)
        seen = await feeder.failed(sink, "maximum messages exceeded")
        assert "refused the event 21" in seen
        await wait_until(lambda: feeder.tail.window.last == 100, description="the events are numbered")
        assert (await sink.read_lag()).positions == 80
        await _manage(server.url, lambda jetstream: jetstream.update_stream(config, max_msgs=-1))
        await feeder.caught_up(sink)
    await feeder.check(await read_stream(server.url))


async def test_a_message_that_is_refused_keeps_back_all_after_it(feeder: Feeder, server: NatsProcess) -> None:
    # The first event is too large for the stream, and the smaller ones after it are on their way with it.
    config = nats.js.api.StreamConfig("octollm", subjects=["octollm.events.>"], max_msg_size=1000)
    await _manage(server.url, lambda jetstream: jetstream.add_stream(config))
    async with feeder.db.transaction() as tx:
        await feeder.log.append(
            tx, "arm.healthy", subject="arm/a0", tenant="acme", source="orchestrator", data={"arm": "a" * 2000}
        )
    await feeder.write(30)
    async with feeder.sink(server.url) as sink:
        await feeder.failed(sink, "refused the event 1:")
        assert await read_stream(server.url) == []
        await _manage(server.url, lambda jetstream: jetstream.update_stream(config, max_msg_size=-1))
        await feeder.caught_up(sink)
    await feeder.check(await read_stream(server.url))


async def test_another_publisher_in_the_stream_costs_nothing_but_time(feeder: Feeder, server: NatsProcess) -> None:
    async with feeder.sink(server.url) as sink:
        await feeder.write(10)
        await feeder.caught_up(sink)
        for number in range(5):
            foreign = {"Nats-Msg-Id": f"x-{number}"} if number % 2 else None
            await _manage(
                server.url,
                lambda jetstream, headers=foreign: jetstream.publish("octollm.events.x", b"not ours", headers=headers),
            )
            await feeder.write(40)
            await feeder.caught_up(sink)
    await feeder.check([each for each in await read_stream(server.url) if each.body != b"not ours"])


USERS = """
authorization { users: [
  { user: octollm, password: "s3cret-word", permissions: {
    publish: ["octollm.events.>", "$JS.API.STREAM.INFO.octollm", "$JS.API.STREAM.MSG.GET.octollm"]
    subscribe: ["_INBOX.>"] } }
  { user: admin, password: admin }
] }
"""


async def test_wrong_credentials_and_missing_rights_are_told_without_the_secret(feeder: Feeder, tmp_path: Path) -> None:
    server = NatsProcess(tmp_path / "nats", USERS)
    server.start()
    try:
        await feeder.write(10)
        async with feeder.sink(server.url.replace("//", "//octollm:wr0ng-word@")) as sink:
            seen = await feeder.failed(sink, "Authorization Violation")
            assert "wr0ng" not in seen
        async with feeder.sink(server.url.replace("//", "//octollm:s3cret-word@")) as sink:
            seen = await feeder.failed(sink, "nats stream add octollm --subjects 'octollm.events.>'")
            assert "s3cret" not in seen
            admin = server.url.replace("//", "//admin:admin@")
            await _manage(admin, lambda jetstream: jetstream.add_stream(name="octollm", subjects=["octollm.events.>"]))
            # With no more rights than the documentation names.
            await feeder.caught_up(sink)
        await feeder.check(await read_stream(admin))
    finally:
        server.kill()


async def test_tls_is_required_before_credentials_are_sent(feeder: Feeder, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    secured = NatsProcess(
        tmp_path / "secured", f'tls {{ cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem" }}'
    )
    plain = NatsProcess(tmp_path / "plain", "authorization { user: a, password: b }")
    await feeder.write(10)
    try:
        plain.start()
        secured.start()
        async with feeder.sink(plain.url.replace("nats://", "tls://a:b@")) as sink:
            await feeder.failed(sink, "the server does not use TLS")
        tls_url = secured.url.replace("nats://", "tls://")
        async with feeder.sink(tls_url) as sink:
            await feeder.failed(sink, "certificate verify failed")
        async with feeder.sink(tls_url, ca=tmp_path / "ca.pem") as sink:
            await feeder.caught_up(sink)
    finally:
        plain.kill()
        secured.kill()


async def test_two_replicas_that_both_feed_it_store_each_event_once(feeder: Feeder, server: NatsProcess) -> None:
    await feeder.write(200)
    async with feeder.sink(server.url) as one:
        await feeder.caught_up(one)
        async with feeder.sink(server.url):
            for _ in range(5):
                # The lease expires unnoticed, as after a long pause of the process that holds it.
                async with feeder.db.transaction() as tx:
                    await tx.execute(update(relay_state).where(relay_state.c.name == "sink").values(lease_until=0.0))
                await feeder.write(300)
                await feeder.caught_up(one)
        assert (await one.check_health()).ok
    await feeder.check(await read_stream(server.url))


async def test_a_former_holder_that_still_sends_changes_nothing(feeder: Feeder, server: NatsProcess) -> None:
    await feeder.write(100)
    target = feeder.target(server.url)
    async with target.connect() as former:
        async with feeder.sink(server.url) as sink:
            await feeder.caught_up(sink)
        # It believes that the stream is empty, and sends the same events with others in between left out.
        batch = await feeder.log.read(0, 100, tenant=None)
        stored: list[int] = []
        with pytest.raises(OctoError, match="did not publish"):
            await former.publish(
                [msgspec.structs.replace(event, id=f"other-{event.seq}") for event in batch],
                lambda event, _duplicate: stored.append(event.seq),
            )
        assert stored == []
    await feeder.check(await read_stream(server.url))


async def test_acknowledged_messages_that_the_server_lost_are_sent_again(
    feeder: Feeder, server: NatsProcess, tmp_path: Path
) -> None:
    store, saved = tmp_path / "nats" / "js", tmp_path / "saved"
    async with feeder.sink(server.url) as sink:
        await feeder.write(50)
        await feeder.caught_up(sink)
        server.kill()
        shutil.copytree(store, saved)
        server.start()
        await feeder.write(50)
        await feeder.caught_up(sink)
        # An older state of its disk: a power failure before it was synced, or a restored backup.
        server.kill()
        shutil.rmtree(store)
        shutil.copytree(saved, store)
        server.start()
        await feeder.write(1)
        await feeder.caught_up(sink)
        async with asyncio.timeout(20):
            while len(await read_stream(server.url)) < 101:
                await asyncio.sleep(0.05)
    await feeder.check(await read_stream(server.url))


@pytest.mark.parametrize(("start", "expected"), [("earliest", 60), ("latest", 10)])
async def test_a_new_stream_gets_what_the_log_has_or_what_comes(
    feeder: Feeder, server: NatsProcess, start: str, expected: int
) -> None:
    await feeder.write(50)
    await wait_until(lambda: feeder.tail.window.last == 50, description="the events are numbered")
    url = f"{server.url}?start={start}"

    async def has_position() -> bool:
        async with feeder.db.read() as connection:
            return await connection.first(select(relay_state).where(relay_state.c.name == "sink")) is not None

    async with feeder.sink(url) as sink:
        # Before it has one, `latest` would begin after the events that come next.
        await wait_until(has_position, description="the sink has a position")
        await feeder.caught_up(sink)
        await feeder.write(10)
        await feeder.caught_up(sink)
        assert len(await read_stream(server.url)) == expected
    # Deleted: it is filled again, with `latest` from the position on.
    await _manage(server.url, lambda jetstream: jetstream.delete_stream("octollm"))
    async with feeder.sink(url) as sink:
        await feeder.write(1)
        await feeder.caught_up(sink)
    assert len(await read_stream(server.url)) == (61 if start == "earliest" else 1)


async def test_events_that_retention_deleted_are_a_gap_that_is_told(feeder: Feeder, server: NatsProcess) -> None:
    await feeder.write(20)
    async with feeder.sink(server.url) as sink:
        await feeder.caught_up(sink)
    await feeder.write(20)
    await wait_until(lambda: feeder.tail.window.last == 40, description="the events are numbered")
    async with feeder.db.transaction() as tx:
        await tx.execute(delete(events).where(events.c.seq <= 30))
        await tx.execute(update(relay_state).where(relay_state.c.name == "sink").values(published=20))
    feeder.tail.window.__init__()  # as in a process that starts later
    async with feeder.sink(server.url) as sink:
        await wait_until(lambda: feeder.count("stored") == 31, description="the rest and the gap are stored")
        await feeder.caught_up(sink)
    stored = [each.event for each in await read_stream(server.url)]
    assert [event["seq"] for event in stored] == [*range(1, 21), *range(31, 42)]
    told = {"reader": "sink", "after": 20, "through": 30, "reason": "position_expired"}
    assert (stored[-1]["event_type"], stored[-1]["tenant"], stored[-1]["data"]) == ("log.gap", "system", told)


async def test_while_redis_says_nothing_it_reads_the_log(server: NatsProcess) -> None:
    # As a replica that neither numbers events nor hears of them.
    async with open_feeder("memory://") as feeder, open_redis("memory://elsewhere") as elsewhere:
        async with LogTail(elsewhere, feeder.keys) as deaf:
            feeder.tail = deaf
            async with feeder.sink(server.url) as sink:
                await feeder.write(10)
                await feeder.caught_up(sink)
                await feeder.write(10)
                await feeder.caught_up(sink)
        await feeder.check(await read_stream(server.url))


async def test_a_stop_saves_the_position_and_gives_up_the_lease(feeder: Feeder, server: NatsProcess) -> None:
    async with feeder.sink(server.url) as sink:
        await feeder.write(30)
        await feeder.caught_up(sink)
    async with feeder.db.read() as connection:
        row = await connection.first(select(relay_state).where(relay_state.c.name == "sink"))
        assert await read_sink_position(connection) == 30
    assert row is not None
    assert (row["lease_until"], row["numbered"]) == (0.0, 0)


async def test_a_stream_with_other_subjects_is_refused(feeder: Feeder, server: NatsProcess) -> None:
    await _manage(server.url, lambda jetstream: jetstream.add_stream(name="octollm", subjects=["other.>"]))
    async with feeder.sink(server.url) as sink:
        await feeder.failed(sink, "does not store octollm.events.>")


def test_without_the_library_it_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(SettingError, match=r"pip install 'octollm\[nats\]'"):
        JetStreamSink(_parsed("nats://127.0.0.1"), None, external_context())


def test_credentials_that_others_may_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "user.creds"
    file.write_text("x")
    file.chmod(0o644)
    with pytest.raises(SettingError, match="holds a secret"):
        JetStreamSink(_parsed("nats://127.0.0.1"), file, external_context())
    with pytest.raises(SettingError, match="OCTOLLM_EVENT_SINK_CREDENTIALS cannot be read"):
        JetStreamSink(_parsed("nats://127.0.0.1"), tmp_path / "none", external_context())


@pytest.mark.parametrize(
    ("patterns", "covered"),
    [
        (["octollm.events.>"], True),
        (["octollm.>"], True),
        ([">"], True),
        (["*.events.*.*.*"], True),
        (["octollm.events.*.arm.>", "octollm.events.>"], True),
        (["octollm.events.*.arm.>"], False),
        (["octollm.events.*"], False),
        (["octollm.events"], False),
        (["octollm.events.*.*.*.>"], False),
        ([], False),
    ],
)
def test_which_subjects_of_a_stream_take_every_event(patterns: list[str], covered: bool) -> None:
    assert covers_events(patterns, "octollm.events") is covered


async def test_the_orchestrator_feeds_it_and_says_how_far_it_is(tmp_path: Path, server: NatsProcess) -> None:
    async with orchestrator_kit(tmp_path, Script(), OCTOLLM_EVENT_SINK=server.url) as orch:
        task = await orch.run({"goal": "one"})
        listed: dict[str, Any] = {}

        async def is_done() -> bool:
            nonlocal listed
            listed = msgspec.json.decode((await orch.send("GET", "/subscriptions")).body)
            return listed["sink"]["lag"]["positions"] == 0

        await wait_until(is_done, description="the sink has caught up")
        assert listed["sink"]["name"] == "nats stream octollm"
        ready = msgspec.json.decode((await orch.send("GET", "/ready")).body)
        assert ready["dependencies"]["event_sink"]["ok"]
        found = await read_stream(server.url, subject="octollm.events.*.task.completed")
        assert [each.event["data"]["task_id"] for each in found] == [task.task_id]
        metrics = (await orch.send("GET", "/metrics")).body.decode()
        assert 'octollm_event_sink_events_total{outcome="stored"}' in metrics


async def test_retention_keeps_what_a_configured_sink_does_not_have(feeder: Feeder, server: NatsProcess) -> None:
    subscriptions = SubscriptionStore(feeder.db, CLOCK, IDS)
    async with feeder.sink(server.url) as sink:
        await feeder.write(10)
        await feeder.caught_up(sink)
    await feeder.write(10)
    assert await lowest_needed_position(feeder.db, subscriptions) is None
    assert await lowest_needed_position(feeder.db, subscriptions, with_sink=True) == 10


async def test_a_credentials_file_of_an_operator_is_used(feeder: Feeder, tmp_path: Path) -> None:
    operator, account, user, system = (nkeys.from_seed(nkeys.encode_seed(bytes([n]) * 32, kind)) for n, kind in NKEYS)
    operator_jwt = _nats_jwt(operator, operator, {"type": "operator", "version": 2})
    limits = {"subs": -1, "conn": -1, "data": -1, "payload": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1}
    account_jwt = _nats_jwt(operator, account, {"type": "account", "version": 2, "limits": limits | {"consumer": -1}})
    user_jwt = _nats_jwt(account, user, {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1})
    system_jwt = _nats_jwt(operator, system, {"type": "account", "version": 2})
    credentials = tmp_path / "user.creds"
    seed = bytes(user.seed).decode()
    credentials.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    credentials.chmod(0o600)
    jwts = {account.public_key.decode(): account_jwt, system.public_key.decode(): system_jwt}
    preload = ", ".join(f'{key}: "{jwt}"' for key, jwt in jwts.items())
    server = NatsProcess(
        tmp_path / "nats",
        f'operator: "{operator_jwt}"\nsystem_account: {system.public_key.decode()}\n'
        f"resolver: MEMORY\nresolver_preload {{ {preload} }}",
    )
    server.start()
    try:
        await feeder.write(10)
        async with feeder.sink(server.url) as sink:
            await feeder.failed(sink, "Authorization Violation")
        async with feeder.sink(server.url, credentials=credentials) as sink:
            await feeder.caught_up(sink)
    finally:
        server.kill()
    assert feeder.count("stored") == 10


NKEYS = (
    (1, nkeys.PREFIX_BYTE_OPERATOR),
    (2, nkeys.PREFIX_BYTE_ACCOUNT),
    (3, nkeys.PREFIX_BYTE_USER),
    (4, nkeys.PREFIX_BYTE_ACCOUNT),
)


def _nats_jwt(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, claims: dict[str, Any]) -> str:
    """Return a JWT of NATS, which its servers verify."""
    body = {"iss": issuer.public_key.decode(), "sub": subject.public_key.decode(), "iat": 1, "jti": "x", "nats": claims}
    parts = [msgspec.json.encode(part) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body)]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    return (signed + b"." + base64.urlsafe_b64encode(issuer.sign(signed)).rstrip(b"=")).decode()


async def _manage(url: str, action: Any) -> None:
    client = await nats.connect(url)
    try:
        await action(client.jetstream())
    finally:
        await client.close()
