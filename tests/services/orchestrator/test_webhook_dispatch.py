"""Deliveries over real HTTP and real databases: in order per subject, at least once, with the same id."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import webhook_kit
from databases import Backend
from sqlalchemy import delete, func, select, update
from starlette.responses import Response
from webhook_kit import CLOCK, IDS, Receiver, Replica, add_webhook, append, receiver, replica

from octollm.capability import SigningKey
from octollm.events import OutboxPublisher
from octollm.services.orchestrator import webhook_attempts
from octollm.services.orchestrator.webhook_feed import WebhookMonitor
from octollm.storage import Database, MemoryServers, RedisKeys, open_database, open_redis
from octollm.storage.migrations import migrate
from octollm.storage.tables import api_keys, audit, events, webhook_deliveries, webhook_feed, webhooks
from octollm.telemetry import Metrics, get_logger
from octollm.testing import wait_until

ROOT = SigningKey.generate("root")
Made = Callable[..., Replica]


@pytest.fixture
async def db(backend: Backend, tmp_path: Path) -> AsyncGenerator[Database]:
    # In a file, so that another process can open it.
    url = f"sqlite:///{tmp_path}/o.db" if backend.base is None else backend.url("octollm_orchestrator")
    async with open_database(url, clock=CLOCK) as found, open_redis("memory://", servers=MemoryServers()) as redis:
        await migrate(found, "orchestrator")
        made = replica(found, ROOT)
        async with OutboxPublisher(found, made.log, redis, CLOCK, IDS, keys=RedisKeys()):
            yield found


async def until(predicate: Callable[[], object | Awaitable[object]], what: str) -> None:
    await wait_until(predicate, description=what, timeout=20)


async def row(db: Database, table: Any, **where: Any) -> Any:
    async with db.read() as conn:
        query = select(table)
        for name, value in where.items():
            query = query.where(table.c[name] == value)
        return await conn.first(query)


async def states(db: Database, webhook_id: str) -> dict[str, int]:
    async with db.read() as conn:
        counted = select(webhook_deliveries.c.state, func.count().label("n")).group_by(webhook_deliveries.c.state)
        rows = await conn.all(counted.where(webhook_deliveries.c.webhook_id == webhook_id))
    return {each["state"]: each["n"] for each in rows}


async def make_due(db: Database) -> None:
    """Make what waits for another attempt due now, instead of waiting for it."""
    async with db.transaction() as tx:
        await tx.execute(update(webhooks).values(paused_until=0.0))
        await tx.execute(update(webhook_deliveries).values(due_at=CLOCK.now() - 1))


async def set_clock_back(db: Database) -> None:
    """Make what waits look as if the clock had been set back by a day meanwhile."""
    day = 24 * 3600
    async with db.transaction() as tx:
        await tx.execute(update(webhooks).values(paused_until=CLOCK.now() + day))
        await tx.execute(update(webhook_deliveries).values(due_at=webhook_deliveries.c.due_at + day))


async def test_a_receiver_of_the_standard_library_verifies_every_delivery(db: Database):
    async with receiver() as target:
        made = replica(db, ROOT, target.url)
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        ids = [each for number in range(5) for each in await append(made, f"t{number}", 20)]
        await append(made, "other", 3, tenant="globex")
        async with made.running():
            await until(lambda: len(target.received) >= 100, "100 deliveries")
            ids += await append(made, "t1", 5)
            await until(lambda: len(target.received) >= 105, "five more")
        assert sorted(event["id"] for event in target.received) == sorted(ids)
        assert all(versions == sorted(versions) for versions in target.versions().values())
        assert [head["webhook-id"] for head in target.headers] == [event["id"] for event in target.received]
        assert target.refused == []
        await until(lambda: _delivered(db, webhook_id, 105), "every outcome is stored")


async def _delivered(db: Database, webhook_id: str, count: int) -> bool:
    return await states(db, webhook_id) == {"delivered": count}


async def test_a_failure_holds_its_subject_only_and_is_repeated_with_its_id(db: Database):
    failing = {"task/t1"}

    def respond(event: dict[str, Any], _count: int) -> Response:
        return Response(status_code=500 if event["subject"] in failing else 200)

    async with receiver(respond=respond) as target:
        made = replica(db, ROOT, target.url)
        _webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        first, *_rest = await append(made, "t1", 3)
        await append(made, "t2", 3)
        async with made.running():

            async def is_attempted() -> bool:
                found = await row(db, webhook_deliveries, event_id=first)
                return found is not None and found["attempts"] == 1 and len(target.received) == 3

            await until(is_attempted, "the other subject, and one failure")
            waiting = await row(db, webhook_deliveries, event_id=first)
            assert set(target.versions()) == {"task/t2"}
            assert (waiting["last_status"], waiting["attempts"]) == (500, 1)
            assert 2 <= waiting["due_at"] - CLOCK.now() <= 6
            await set_clock_back(db)
            await until(lambda: target.attempts[first] >= 2, "a second attempt")
            failing.clear()
            await until(lambda: _all_received(db, target, 6), "the rest")
        assert target.versions() == {"task/t2": [1, 2, 3], "task/t1": [1, 2, 3]}


async def _all_received(db: Database, target: Receiver, count: int) -> bool:
    await make_due(db)
    return len(target.received) >= count


async def test_410_disables_at_once_and_the_rest_are_dead_letters(db: Database):
    async with receiver(respond=lambda _event, _count: Response(status_code=410)) as target:
        made = replica(db, ROOT, target.url)
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        await append(made, "t1", 10)
        async with made.running():
            await until(lambda: _is_disabled(db, webhook_id), "the webhook is disabled")
        assert await states(db, webhook_id) == {"dead": 10}
        assert len(target.attempts) == 1
        found = await row(db, webhooks, id=webhook_id)
        assert found["reason"] == "The receiver answered 410 Gone."
        event = await row(db, events, event_type="webhook.disabled")
        assert (event["tenant"], event["data"]["webhook_id"]) == ("acme", webhook_id)
        assert (await row(db, audit, action="webhook.disabled"))["target"] == webhook_id
        assert (await row(db, events, event_type="webhook.dead"))["data"]["event_id"] in target.attempts


async def _is_disabled(db: Database, webhook_id: str) -> bool:
    return (await row(db, webhooks, id=webhook_id))["state"] == "disabled"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_a_day_of_failures_disables(db: Database):
    async with receiver(respond=lambda _event, _count: Response(status_code=503)) as target:
        made = replica(db, ROOT, target.url)
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        [event_id] = await append(made, "t1", 1)
        async with made.running():
            await until(lambda: target.attempts.get(event_id), "the first attempt")
            await until(lambda: _has_failed(db, webhook_id), "it is stored")
            async with db.transaction() as tx:
                day_ago = CLOCK.now() - webhook_attempts.GIVE_UP_SECONDS - 1
                await tx.execute(update(webhooks).values(failing_since=day_ago, paused_until=0.0))
                await tx.execute(update(webhook_deliveries).values(first_attempt_at=day_ago, due_at=0.0))
            await until(lambda: _is_disabled(db, webhook_id), "the webhook is disabled")
        assert "24 hours" in (await row(db, webhooks, id=webhook_id))["reason"]
        assert await states(db, webhook_id) == {"dead": 1}


async def _has_failed(db: Database, webhook_id: str) -> bool:
    found = await row(db, webhooks, id=webhook_id)
    return found["failures"] == 1 and found["lease_until"] == 0


@contextlib.asynccontextmanager
async def raw_receiver(*parts: bytes, endless: bytes = b"") -> AsyncGenerator[tuple[str, list[int]]]:
    """A receiver that writes ``parts``, then ``endless`` for ever if there is one; else it stays silent."""
    count = [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            count[0] += 1
            for part in parts:
                writer.write(part)
            while endless:
                writer.write(endless)
                await writer.drain()
            await reader.read()
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", count


INSIDE = b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:8001/token\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("parts", "endless", "state", "error"),
    [
        ([], b"", "pending", "did not answer in the 0.5 s"),
        ([b"HTTP/1.1 200 OK\r\n"], b"", "pending", "did not answer"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 10737418240\r\n\r\n"], b"x" * 65536, "delivered", ""),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"], b"", "delivered", ""),
        (
            [b"HTTP/1.1 500 Oh\r\ntransfer-encoding: chunked\r\n\r\n"],
            b"1000\r\n" + b"x" * 4096 + b"\r\n",
            "pending",
            "500",
        ),
        ([INSIDE], b"", "pending", "The receiver answered 307."),
        ([b"SMTP\r\n\r\n"], b"", "pending", "invalid HTTP"),
    ],
)
async def test_a_bad_receiver_costs_an_attempt_and_the_others_nothing(
    db: Database, monkeypatch, parts: list[bytes], endless: bytes, state: str, error: str
):
    monkeypatch.setattr(webhook_attempts, "ATTEMPT_SECONDS", 0.5)
    async with receiver() as target, raw_receiver(*parts, endless=endless) as (url, count):
        made = replica(db, ROOT, target.url, url)
        bad_id, _secret = await add_webhook(made, url)
        _good_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        [event_id] = await append(made, "t1", 1)
        await append(made, "t2", 30)
        async with made.running():
            await until(lambda: len(target.received) == 31, "the other receiver has everything")

            async def is_attempted() -> bool:
                found = await row(db, webhook_deliveries, webhook_id=bad_id, event_id=event_id)
                return found["attempts"] >= 1

            await until(is_attempted, "an attempt is stored")
        found = await row(db, webhook_deliveries, webhook_id=bad_id, event_id=event_id)
        assert (found["state"], error in found["last_error"]) == (state, True), found["last_error"]
        assert count[0] >= 1


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_a_url_that_leads_inside_by_now_is_not_called(db: Database):
    made = replica(db, ROOT)
    webhook_id, _secret = await add_webhook(made, "https://169.254.169.254/latest/")
    await append(made, "t1", 1)

    async def is_attempted() -> bool:
        found = await row(db, webhook_deliveries, webhook_id=webhook_id)
        return found is not None and "refused" in found["last_error"]

    async with made.running():
        await until(is_attempted, "the attempt failed")


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_retry_after_is_kept_and_bounded(db: Database):
    def busy(_event: dict[str, Any], _count: int) -> Response:
        return Response(status_code=429, headers={"Retry-After": "99999"})

    async with receiver(respond=busy) as target:
        made = replica(db, ROOT, target.url)
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        await append(made, "t1", 1)
        async with made.running():
            await until(lambda: _has_failed(db, webhook_id), "the first attempt")
        found = await row(db, webhooks, id=webhook_id)
        assert 3500 < found["paused_until"] - CLOCK.now() <= 3600


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_a_secret_rotated_on_the_way_signs_with_both(db: Database):
    async with receiver() as target:
        made = replica(db, ROOT, target.url)
        webhook_id, old = await add_webhook(made, target.url)
        target.secrets = [old]
        async with made.running():
            await append(made, "t1", 10)
            await until(lambda: len(target.received) == 10, "the first half")
            found = await row(db, webhooks, id=webhook_id)
            new = webhook_kit.generate_secret("standard")
            column = made.secrets.rotate(webhook_id, found["secrets"], new, 60)
            async with db.transaction() as tx:
                await tx.execute(update(webhooks).values(secrets=column))
            await append(made, "t1", 10)
            await until(lambda: len(target.received) == 20, "a receiver with the old secret")
            target.secrets = [new]
            await append(made, "t1", 10)
            await until(lambda: len(target.received) == 30, "a receiver with the new secret")
        assert target.refused == []
        assert [len(head["webhook-signature"].split(" ")) for head in target.headers] == [1] * 10 + [2] * 20
        assert target.versions() == {"task/t1": list(range(1, 31))}


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
async def test_a_webhook_ends_with_its_creator(db: Database):
    async with receiver() as target:
        made = replica(db, ROOT, target.url)
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        async with db.transaction() as tx:
            await tx.execute(update(api_keys).values(revoked_at=1.0))
        await append(made, "t1", 2)
        async with made.running():
            await until(lambda: _is_disabled(db, webhook_id), "the webhook is disabled")
        assert target.received == []


@contextlib.asynccontextmanager
async def process(db_url: str, origin: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, webhook_kit.__file__, db_url, json.dumps(ROOT.to_jwk(private=True)), origin),
        stdout=asyncio.subprocess.PIPE,
    )
    assert started.stdout is not None
    assert await started.stdout.readline() == b"ready\n"
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


async def test_a_replica_killed_in_the_middle_loses_nothing_and_keeps_the_order(
    backend: Backend, db: Database, tmp_path: Path
):
    url = f"sqlite:///{tmp_path}/o.db" if backend.base is None else backend.url("octollm_orchestrator")
    async with receiver(delay=0.02) as target:
        made = replica(db, ROOT, target.url)
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        ids = [each for number in range(10) for each in await append(made, f"t{number}", 40)]
        async with process(url, target.url) as first:
            await until(lambda: len(target.received) >= 50, "some deliveries")
            first.send_signal(signal.SIGKILL)
            await first.wait()
        assert len(target.received) < 400
        async with db.transaction() as tx:
            # Instead of waiting for the lease of the dead to end.
            await tx.execute(update(webhooks).values(lease_until=0.0))
        async with process(url, target.url):
            await until(lambda: _delivered(db, webhook_id, 400), "every delivery is stored")
        assert {event["id"] for event in target.received} == set(ids)
        assert target.refused == []
        for versions in target.versions().values():
            # A subject goes on where it was, or repeats what had not been stored, in order.
            firsts = list(dict.fromkeys(versions))
            assert firsts == sorted(firsts) == list(range(1, 41))
        repeats = [count for count in target.attempts.values() if count > 1]
        assert len(repeats) <= 256


async def test_a_cut_position_is_told_to_the_receiver_and_the_feed_goes_on(db: Database):
    async with receiver() as target:
        made = replica(db, ROOT, target.url)
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        ids = await append(made, "a", 6)
        await until(lambda: _head(db, 6), "all have a position")
        async with db.transaction() as tx:
            await tx.execute(delete(events).where(events.c.seq <= 4))
        async with made.running():
            await until(lambda: len(target.received) >= 3, "the last two and the gap")
        assert [event["id"] for event in target.received if event["event_type"] == "task.progress"] == ids[4:]
        [gap] = [event for event in target.received if event["event_type"] == "log.gap"]
        assert gap["data"] == {
            "reader": f"webhook/{webhook_id}",
            "after": 0,
            "through": 4,
            "reason": "position_expired",
        }


async def test_a_feed_beyond_the_end_of_the_log_goes_on(db: Database):
    async with receiver() as target:
        made = replica(db, ROOT, target.url)
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        async with db.transaction() as tx:
            await tx.execute(tx.insert(webhook_feed).values(id=1, position=999_999))
            await tx.execute(update(webhooks).values(start_seq=999_998))
        ids = await append(made, "a", 2)
        await until(lambda: _head(db, 2), "all have a position")
        async with made.running():
            await until(lambda: len(target.received) >= 3, "two and the gap")
        assert [event["id"] for event in target.received if event["event_type"] == "task.progress"] == ids
        [gap] = [event for event in target.received if event["event_type"] == "log.gap"]
        assert (gap["data"]["after"], gap["data"]["reason"]) == (999_999, "position_unknown")
        assert (await row(db, webhooks, id=webhook_id))["start_seq"] == 0


async def _head(db: Database, position: int) -> bool:
    async with db.read() as conn:
        return await conn.scalar(select(func.max(events.c.seq))) == position


async def test_the_queue_of_a_webhook_is_measured(db: Database):
    metrics = Metrics("orchestrator")
    async with receiver(respond=lambda _event, _count: Response(status_code=500)) as target:
        made = replica(db, ROOT, target.url)
        made.dispatcher._count_attempt = lambda outcome: metrics.webhook_attempts.labels(outcome).inc()
        monitor = WebhookMonitor(db, made.log, metrics, get_logger("webhooks"))
        webhook_id, secret = await add_webhook(made, target.url)
        target.secrets = [secret]
        await append(made, "a", 3)
        await until(lambda: _head(db, 3), "all have a position")
        await monitor.measure()
        assert metrics.webhook_feed_lag._value.get() == 3
        async with made.running():
            await until(lambda: _sample(metrics, "octollm_webhook_attempts_total", outcome="failed"), "one has failed")
        await monitor.measure()
        of = {"tenant": "acme", "webhook": webhook_id}
        assert _sample(metrics, "octollm_webhook_pending_deliveries", **of) == 3
        assert 0 <= _sample(metrics, "octollm_webhook_oldest_pending_seconds", **of) < 60
        assert _sample(metrics, "octollm_webhook_feed_lag_events") == 0
        assert (await monitor.check_health()).ok
        async with db.transaction() as tx:
            await tx.execute(update(webhook_deliveries).values(created_at=CLOCK.now() - 400))
        await monitor.measure()
        status = await monitor.check_health()
        assert not status.ok
        assert not status.required
        assert webhook_id in status.detail
        async with db.transaction() as tx:
            await tx.execute(update(webhook_deliveries).values(state="dead"))
        await monitor.measure()
        assert _sample(metrics, "octollm_webhook_dead_deliveries", **of) == 3
        assert metrics.registry.get_sample_value("octollm_webhook_pending_deliveries", of) is None


def _sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0
