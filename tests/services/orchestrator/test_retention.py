"""Retention: the oldest goes first, in the archive before it is deleted; what a subscription needs goes last."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import sqlite3
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from databases import Backend
from hypothesis import given
from hypothesis import strategies as st
from orchestrator_kit import OrchestratorHarness, problem
from sqlalchemy import func, insert, select, update

from octollm.capability import Principal, SigningKey
from octollm.clock import Uuid7Generator, format_rfc3339
from octollm.config import Settings
from octollm.contracts.observability import AuditRow
from octollm.contracts.subscriptions import SubscriptionSpec
from octollm.errors import OctoError, SettingError
from octollm.events import EventLog, SubscriptionStore
from octollm.events.sequencer import Sequencer
from octollm.rpc.idempotency import RETENTION_SECONDS, HeldClaim, IdempotencyKey
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.archive import open_archive, read_archived_audit
from octollm.services.orchestrator.audit import Actor, AuditSealer, read_audit_page, record_audit
from octollm.services.orchestrator.files import FileStore
from octollm.services.orchestrator.retention import (
    DAY,
    Cut,
    Retention,
    RetentionPolicy,
    RetentionResult,
    lowest_needed_position,
    open_retention,
    plan_cut,
)
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import (
    audit,
    events,
    files,
    idempotency,
    memory_erasures,
    model_journal,
    relay_state,
    steps,
    task_files,
    tasks,
    webhook_feed,
    webhooks,
)
from octollm.testing import ManualClock

ROWS = [(seq, f"2025-01-{seq:02d}T00:00:00.000Z") for seq in range(1, 21)]
NEVER = ("", 2**62)


@pytest.mark.parametrize(
    ("limits", "hold", "needed", "expected"),
    [
        (NEVER, NEVER, None, Cut()),
        (("2025-01-06T00:00:00.000Z", 2**62), NEVER, None, Cut(5)),
        (("", 8), NEVER, None, Cut(12)),
        (("", 8), NEVER, 4, Cut(4)),  # a subscription has handled four of them
        (("", 8), ("", 16), 2, Cut(4, 2)),  # but not more than twice as many are kept
        (("2025-01-06T00:00:00.000Z", 2**62), ("2025-01-03T00:00:00.000Z", 2**62), 0, Cut(2, 2)),
        (("", 8), ("", 16), 20, Cut(12)),
    ],
)
def test_what_is_cut(limits: tuple[str, int], hold: tuple[str, int], needed: int | None, expected: Cut) -> None:
    assert plan_cut(ROWS, 20, limits, hold, needed) == expected


@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 40), st.none() | st.integers(0, 40))
def test_nothing_that_is_needed_goes_without_being_counted(
    length: int, keep: int, more: int, needed: int | None
) -> None:
    rows = [(seq, "2025") for seq in range(1, length + 1)]
    cut = plan_cut(rows, length, ("", keep), ("", keep + more), needed)
    assert 0 <= cut.truncated <= cut.count <= length
    assert length - cut.count >= min(keep, length)
    unhandled = 0 if needed is None else max(0, cut.count - needed)
    assert cut.truncated == unhandled
    if unhandled:
        assert length - cut.count >= min(keep + more, length)


@dataclass
class RetentionKit:
    """A database with retention, and what was archived and counted."""

    db: Database
    log: EventLog
    clock: ManualClock
    needed: int | None = None
    archived: dict[str, bytes] = field(default_factory=dict[str, bytes])
    counted: dict[str, int] = field(default_factory=dict[str, int])
    error: OctoError | None = None
    erase_error: OctoError | None = None
    """What the memory answers."""
    refused: str = ""
    """A task that the memory refuses to erase."""
    erased: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def retention(self, policy: RetentionPolicy, *, holder: str = "one") -> Retention:
        async def lowest_position() -> int | None:
            return self.needed

        async def store(name: str, body: bytes) -> None:
            if self.error is not None:
                raise self.error
            self.archived[name] = body

        def count(kind: str, number: int) -> None:
            self.counted[kind] = self.counted.get(kind, 0) + number

        async def erase(tenant: str, task_id: str) -> None:
            if task_id == self.refused:
                raise OctoError("no", code="internal")
            if self.erase_error is not None:
                raise self.erase_error
            self.erased.append((tenant, task_id))

        return Retention(self.db, self.log, policy, holder, self.clock, lowest_position, store, erase, count)

    async def write(self, number: int) -> None:
        for _ in range(number):
            async with self.db.transaction() as tx:
                await self.log.append(
                    tx, "arm.healthy", subject="arm/x", tenant="t", source="orchestrator", data={"arm": "x"}
                )
        sequencer = Sequencer(self.db, holder="test", lease_seconds=60)
        lease = await sequencer.acquire()
        assert lease is not None
        _events, last = await sequencer.assign(lease.fence, 10_000)
        assert not await sequencer.has_backlog()
        await sequencer.release(lease.fence, last)

    async def positions(self) -> list[int]:
        async with self.db.read() as conn:
            rows = await conn.all(select(events.c.seq).order_by(events.c.seq).limit(10_000))
        return [row["seq"] for row in rows if row["seq"] is not None]


@pytest.fixture
async def kit(backend: Backend) -> AsyncGenerator[RetentionKit]:
    clock = ManualClock()
    async with open_database(backend.url("octollm_orchestrator"), clock=clock) as db:
        await migrate(db, "orchestrator")
        yield RetentionKit(db, EventLog(db, clock, Uuid7Generator(clock)), clock)


async def test_old_events_are_archived_and_deleted(kit: RetentionKit) -> None:
    await kit.write(4)
    kit.clock.time += 10 * DAY
    await kit.write(3)
    result = await kit.retention(RetentionPolicy(event_days=5)).run_round()
    assert result is not None
    assert result.events == 4
    assert await kit.positions() == [5, 6, 7]
    [(name, body)] = kit.archived.items()
    assert name == f"events/{1:019d}-{4:019d}.jsonl"
    assert [json.loads(line)["seq"] for line in body.splitlines()] == [1, 2, 3, 4]
    assert kit.counted == {"events": 4}


async def test_more_events_than_allowed_are_deleted_in_batches(
    kit: RetentionKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octollm.services.orchestrator.retention.EVENT_BATCH", 4)
    await kit.write(11)
    await kit.retention(RetentionPolicy(event_count=2)).run_round()
    assert await kit.positions() == [10, 11]
    assert len(kit.archived) == 3


async def test_what_a_subscription_needs_stays_up_to_twice_the_limit_and_its_loss_is_told(kit: RetentionKit) -> None:
    kit.needed = 3
    await kit.write(6)
    policy = RetentionPolicy(event_count=3)
    await kit.retention(policy).run_round()
    assert await kit.positions() == [4, 5, 6]
    await kit.write(4)
    result = await kit.retention(policy).run_round()
    assert result is not None
    assert (result.events, result.truncated) == (1, 1)
    await kit.write(0)
    assert await kit.positions() == [5, 6, 7, 8, 9, 10, 11]
    [told] = await kit.log.read(0, tenant="system", types=["log.truncated"])
    assert told.data == {"through": 4, "count": 1}
    assert kit.counted["truncated"] == 1


async def test_what_is_needed_is_the_least_of_what_subscriptions_and_webhooks_need(kit: RetentionKit) -> None:
    subscriptions = SubscriptionStore(kit.db, kit.clock, Uuid7Generator(kit.clock))
    assert await lowest_needed_position(kit.db, subscriptions) is None
    await kit.write(6)
    await subscriptions.put("t", "billing", SubscriptionSpec(("events:*",)), event_tenant="t", start=4)
    assert await lowest_needed_position(kit.db, subscriptions) == 4
    await add_webhook_row(kit.db, start=2)
    assert await lowest_needed_position(kit.db, subscriptions) == 2
    async with kit.db.transaction() as tx:
        await tx.execute(insert(webhook_feed).values(id=1, position=3))
    assert await lowest_needed_position(kit.db, subscriptions) == 3
    # As the orchestrator opens it, by settings alone.
    settings = Settings(event_retention_count=1)
    retention = open_retention(settings, kit.db, kit.log, kit.clock, Uuid7Generator(kit.clock))
    retention.policy = RetentionPolicy(event_count=3)
    await kit.write(1)
    await retention.run_round()
    assert await kit.positions() == [4, 5, 6, 7]
    async with kit.db.transaction() as tx:
        await tx.execute(update(webhooks).values(state="disabled"))
    assert await lowest_needed_position(kit.db, subscriptions) == 4


async def add_webhook_row(db: Database, *, start: int) -> None:
    times = {"paused_until": 0.0, "lease_until": 0.0, "created_at": 0.0, "updated_at": 0.0}
    row = {"id": "wh-1", "tenant": "t", "url": "https://example.com", "config": {}, "secrets": [], "sub": "ada"}
    async with db.transaction() as tx:
        await tx.execute(insert(webhooks).values(**row, **times, cred="k", state="active", start_seq=start))


async def test_what_was_not_published_stays(kit: RetentionKit) -> None:
    await kit.write(3)
    async with kit.db.transaction() as tx:
        await tx.execute(update(relay_state).where(relay_state.c.name == "events").values(published=1))
    await kit.retention(RetentionPolicy(event_count=1)).run_round()
    assert await kit.positions() == [2, 3]


async def test_nothing_is_deleted_that_the_archive_did_not_take(kit: RetentionKit) -> None:
    await kit.write(3)
    kit.error = OctoError("full", code="unavailable")
    with pytest.raises(OctoError, match="full"):
        await kit.retention(RetentionPolicy(event_count=1)).run_round()
    assert await kit.positions() == [1, 2, 3]
    kit.error = None
    # The lease was given back.
    assert await kit.retention(RetentionPolicy(event_count=1), holder="two").run_round() is not None
    assert await kit.positions() == [3]


async def test_replicas_take_turns(kit: RetentionKit) -> None:
    await kit.write(1)
    one = kit.retention(RetentionPolicy(event_count=1))
    assert await one._acquire()
    two = kit.retention(RetentionPolicy(event_count=1), holder="two")
    assert await two.run_round() is None
    # The holder died, and then the clock was set back by an hour.
    async with kit.db.transaction() as tx:
        await tx.execute(update(relay_state).values(lease_until=relay_state.c.lease_until + 3600))
    assert await two.run_round() is not None


async def test_without_limits_nothing_is_deleted(kit: RetentionKit) -> None:
    await kit.write(2)
    kit.clock.time += 1000 * DAY
    await kit.retention(RetentionPolicy()).run_round()
    assert await kit.positions() == [1, 2]


async def add_task(kit: RetentionKit, task_id: str, status: str, finished_at: float | None) -> None:
    now = kit.clock.now()
    times = {"created_at": now, "updated_at": now}
    async with kit.db.transaction() as tx:
        row = {"task_id": task_id, "tenant": "t", "sub": "s", "authority": "", "goal": "g", "contract": {}}
        await tx.execute(insert(tasks).values(**row, status=status, finished_at=finished_at, **times))
        step = {"task_id": task_id, "step": "s1", "arm": "coder", "title": "", "spec": {}, "text": ""}
        await tx.execute(insert(steps).values(**step, **times))
        await tx.execute(
            insert(task_files).values(task_id=task_id, role="input", name="a", digest="d1", created_at=now)
        )
        journal = {"tenant": "t", "key": task_id, "task_id": task_id, "body_digest": "x", "answer": b"a", "model": "m"}
        await tx.execute(insert(model_journal).values(**journal, created_at=now))


async def count_rows(db: Database, table: Any) -> int:
    async with db.read() as conn:
        return int(await conn.scalar(select(func.count()).select_from(table)))


async def test_tasks_that_ended_long_ago_go_with_all_that_is_theirs(kit: RetentionKit) -> None:
    old = kit.clock.now()
    await add_task(kit, "task-old", "completed", old)
    await add_task(kit, "task-open", "running", None)
    await FileStore(kit.db, kit.clock).put("t", "a", "text/plain", b"x")
    kit.clock.time += 100 * DAY
    await add_task(kit, "task-new", "failed", kit.clock.now())
    await kit.retention(RetentionPolicy(task_days=90)).run_round()
    async with kit.db.read() as conn:
        left = {row["task_id"] for row in await conn.all(select(tasks.c.task_id).limit(10))}
    assert left == {"task-open", "task-new"}
    assert await count_rows(kit.db, steps) == await count_rows(kit.db, model_journal) == 2
    archived = json.loads(kit.archived["tasks/t/task-old.json"])
    assert archived["task"]["goal"] == "g"
    assert [step["step"] for step in archived["steps"]] == ["s1"]
    assert kit.counted == {"tasks": 1, "erased": 1}
    assert kit.erased == [("t", "task-old")]


async def let_erasures_be_due(kit: RetentionKit) -> None:
    async with kit.db.transaction() as tx:
        await tx.execute(update(memory_erasures).values(due_at=0.0))


async def test_what_tasks_left_in_the_memory_is_erased_once_the_memory_is_there(kit: RetentionKit) -> None:
    for number in range(3):
        await add_task(kit, f"task-{number}", "completed", kit.clock.now())
    await FileStore(kit.db, kit.clock).put("t", "a", "text/plain", b"x")
    kit.clock.time += 100 * DAY
    kit.erase_error = OctoError("away", code="unavailable")
    policy = RetentionPolicy(task_days=90, file_days=90)
    with pytest.raises(OctoError, match="away"):
        await kit.retention(policy).run_round()
    # The rest went on, and what is to erase is known, to another replica too.
    assert await count_rows(kit.db, tasks) == await count_rows(kit.db, files) == 0
    kit.erase_error, kit.refused = None, "task-1"
    await let_erasures_be_due(kit)
    with pytest.raises(OctoError, match="no"):
        await kit.retention(policy, holder="two").run_round()
    assert sorted(kit.erased) == [("t", "task-0"), ("t", "task-2")]
    # What the memory has nothing of is erased.
    kit.refused, kit.erase_error = "", OctoError("nothing", code="not_found")
    assert (await kit.retention(policy).run_round() or RetentionResult()).erasures_left == 1, "it is not due yet"
    await let_erasures_be_due(kit)
    result = await kit.retention(policy).run_round()
    assert result is not None
    assert (result.erased, result.erasures_left) == (1, 0)


async def test_a_process_that_cannot_call_the_memory_leaves_it_to_the_orchestrator(kit: RetentionKit) -> None:
    await add_task(kit, "task-1", "completed", kit.clock.now())
    kit.clock.time += 100 * DAY
    retention = kit.retention(RetentionPolicy(task_days=90))
    retention.erase_task = None
    result = await retention.run_round()
    assert result is not None
    assert (result.tasks, result.erased, result.erasures_left) == (1, 0, 1)
    retention = kit.retention(RetentionPolicy(task_days=90))
    assert (await retention.run_round() or RetentionResult()).erased == 1
    assert kit.erased == [("t", "task-1")]


async def test_idempotency_keys_are_deleted_after_a_day_without_further_calls(kit: RetentionKit) -> None:
    store = SqlIdempotencyStore(kit.db, "holder")
    for number in range(2):
        key = IdempotencyKey("t", "ada", "orchestrator", "tasks.create", f"key-{number}")
        assert isinstance(await store.claim(key, "digest", idempotent=True, bearer=""), HeldClaim)
    async with kit.db.transaction() as tx:
        of_first = idempotency.c.key == "key-0"
        old = idempotency.c.created_at - RETENTION_SECONDS - 1
        await tx.execute(update(idempotency).where(of_first).values(created_at=old))
    await kit.retention(RetentionPolicy()).run_round()
    assert await count_rows(kit.db, idempotency) == 1
    assert kit.counted == {"keys": 1}


async def test_old_audit_rows_move_to_the_archive_and_never_only_disappear(kit: RetentionKit, tmp_path: Path) -> None:
    root = SigningKey.generate("root")
    sealer = AuditSealer(kit.db, kit.log, root, kit.clock)
    actor = Actor(Principal("ada", "key-1", "t"))
    rows: list[AuditRow] = []
    archive = open_archive(f"file://{tmp_path}/archive")
    retention = kit.retention(RetentionPolicy(audit_days=30))
    retention.archive = archive.store
    for _ in range(2):
        for _ in range(3):
            async with kit.db.transaction() as tx:
                await record_audit(tx, actor, "task.created", "x", kit.clock.now())
        await sealer.seal()
        rows += (await read_audit_page(kit.db, "t", len(rows), 10)).rows
        kit.clock.time += 31 * DAY
        await retention.run_round()
    assert kit.counted["audit"] == 6
    assert await count_rows(kit.db, audit) == 0
    # As by a process that died before it deleted.
    first = tmp_path / "archive/audit/t" / f"{1:019d}-{3:019d}.jsonl"
    first.with_name(f"{1:019d}-{2:019d}.jsonl").write_bytes(b"".join(first.read_bytes().splitlines(True)[:2]))
    assert [row async for row in read_archived_audit(archive, "t", 6)] == rows
    assert [row.seq async for row in read_archived_audit(archive, "t", 4)] == [1, 2, 3, 4]
    assert [row async for row in read_archived_audit(archive, "another", 4)] == []
    first.write_text("nonsense\n")
    with pytest.raises(OctoError, match="is no audit row"):
        [row async for row in read_archived_audit(archive, "t", 4)]
    settings = Settings(audit_retention_days=30)
    with pytest.raises(SettingError, match="OCTOLLM_ARCHIVE_URL"):
        open_retention(settings, kit.db, kit.log, kit.clock, Uuid7Generator(kit.clock))


async def test_files_that_no_task_has_go_and_a_new_upload_keeps_one(kit: RetentionKit) -> None:
    store = FileStore(kit.db, kit.clock)
    kept = await store.put("t", "kept", "text/plain", b"kept")
    again = await store.put("t", "again", "text/plain", b"again")
    gone = await store.put("t", "gone", "text/plain", b"gone")
    await add_task(kit, "task-1", "running", None)
    async with kit.db.transaction() as tx:
        await tx.execute(update(task_files).values(digest=kept.digest))
    kit.clock.time += 100 * DAY
    await store.put("t", "again", "text/plain", b"again")
    await kit.retention(RetentionPolicy(file_days=90)).run_round()
    async with kit.db.read() as conn:
        left = {row["digest"] for row in await conn.all(select(files.c.digest).limit(10))}
    assert left == {kept.digest, again.digest}
    assert kit.archived == {f"files/t/{gone.digest}": b"gone"}


class ObjectStore(http.server.BaseHTTPRequestHandler):
    """Takes objects as an S3-compatible service does."""

    objects: dict[str, bytes]
    signed: list[str]

    def do_PUT(self) -> None:
        type(self).signed.append(self.headers.get("authorization", ""))
        type(self).objects[self.path] = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        prefix = parse_qs(query).get("prefix", [""])[0]
        found = [name.removeprefix("/bucket/") for name in type(self).objects if name.startswith(f"/bucket/{prefix}")]
        # The answer of ListObjectsV2 for a bucket, else an object.
        listed = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2025-01-01T00:00:00Z</LastModified><Size>1</Size></Contents>"
            for name in found
        )
        body = type(self).objects.get(path, f"<ListBucketResult>{listed}</ListBucketResult>".encode())
        self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ObjectStore]]:
    kind = type("Store", (ObjectStore,), {"objects": {}, "signed": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "eu-central-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield kind
    server.shutdown()
    server.server_close()


async def test_an_archive_is_a_folder_or_an_s3_compatible_service(
    tmp_path: Path, object_store: type[ObjectStore]
) -> None:
    folder = open_archive(f"file://{tmp_path}/deep/archive")
    await folder.store("events/1.jsonl", b"x")
    assert (tmp_path / "deep/archive/events/1.jsonl").read_bytes() == b"x"
    assert await folder.list_names("events") == ["events/1.jsonl"]
    assert (await folder.list_names("nothing"), await folder.read("events/1.jsonl")) == ([], b"x")
    bucket = open_archive("s3://bucket/prefix")
    await bucket.store("events/1.jsonl", b"y")
    assert await bucket.list_names("events") == ["events/1.jsonl"]
    assert await bucket.read("events/1.jsonl") == b"y"
    assert object_store.objects == {"/bucket/prefix/events/1.jsonl": b"y"}
    assert object_store.signed[0].startswith("AWS4-HMAC-SHA256 Credential=key/")
    with pytest.raises(SettingError):
        open_archive("ftp://x/y")
    with pytest.raises(SettingError, match="No such file or directory"):
        open_archive("file:///proc/nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises((OctoError, SettingError)):
        await open_archive(f"file://{tmp_path}/file/below").store("events/1.jsonl", b"x")
    with pytest.raises(OctoError, match="did not return events/2"):
        await folder.read("events/2.jsonl")


def delete_old_events(path: str, task_id: str) -> int:
    """Delete all events but the last one, and the first of a task; return the last position."""
    with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        [(head,)] = db.execute("SELECT max(seq) FROM events").fetchall()
        db.execute("DELETE FROM events WHERE seq < ?", (head,))
        db.execute("DELETE FROM events WHERE subject = ? AND version < 4", (f"task/{task_id}",))
        db.execute("COMMIT")
    return head


async def test_a_position_that_cannot_be_resumed_is_an_error(orch: OrchestratorHarness) -> None:
    stream = {"Accept": "text/event-stream"}
    for path, headers in (
        ("/events?after=999999", {}),
        ("/events?after=999999", stream),
        ("/events", {**stream, "Last-Event-ID": "999999"}),
    ):
        answer = await orch.send("GET", path, **headers)
        assert (answer.status, problem(answer)["code"]) == (409, "position_unknown"), path
    view = await orch.run({"goal": "x"})
    answer = await orch.send("GET", f"/tasks/{view.task_id}/history?after={view.version + 1}")
    assert (answer.status, problem(answer)["code"]) == (409, "position_unknown")
    assert (await orch.send("GET", f"/tasks/{view.task_id}/history?after={view.version}")).status == 200
    # In a thread: the orchestrator in this event loop may be in the middle of a transaction, which it has to end.
    head = await asyncio.to_thread(delete_old_events, f"{orch.home}/data/orchestrator.db", view.task_id)
    answer = await orch.send("GET", "/events?after=1")
    assert (answer.status, problem(answer)["code"]) == (410, "position_expired")
    assert f"the oldest event is {head}" in problem(answer)["detail"]
    assert (await orch.send("GET", f"/events?after={head - 1}")).status == 200
    assert (await orch.send("GET", "/events?after=0")).status == 200  # the beginning of what there is
    answer = await orch.send("GET", f"/tasks/{view.task_id}/history?after=1")
    assert (answer.status, problem(answer)["code"]) == (410, "position_expired")


def test_timestamps_of_the_log_sort_as_text() -> None:
    assert format_rfc3339(0.0) < format_rfc3339(0.001) < format_rfc3339(1.7e9)
