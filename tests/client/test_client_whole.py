"""Both clients against a whole installation: one suite."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import threading
from pathlib import Path

import httpx
import msgspec
import pytest
from client_kit import FILES, GOAL, SENTENCE, cutting
from scripts import NOTES, default_reply

import octollm
from octollm.client import (
    APIError,
    AsyncClient,
    AuthenticationError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    TaskCancelled,
    TaskFailed,
)
from octollm.client._transport import GatewayTransport
from octollm.client.files import load_files
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.hooks import HookTemplate
from octollm.contracts.subscriptions import SubscriptionRequest
from octollm.contracts.webhooks import WebhookRequest
from octollm.errors import OctoError
from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply

NOBODY = "task-" + "0" * 32


async def test_a_goal_from_submission_to_result(octo, tmp_path: Path):
    (tmp_path / "notes.md").write_text(NOTES)
    task = await octo.submit(GOAL, files=[tmp_path / "notes.md"], budget={"max_tokens": 4000}, context="Be short.")
    updates = [update async for update in task.updates()]
    assert [update.seq for update in updates if update.type != "token"] == list(range(1, updates[-1].seq + 1))
    assert updates[-1].type == "result"
    text = "".join(update.text for update in updates if update.type == "token" and update.step == "s1")
    assert text == SENTENCE
    done = await task.result(timeout=10)
    assert SENTENCE in done.output
    assert done.usage.total_tokens > 0
    assert done.budget.max_tokens == 4000
    assert [event.version async for event in task.history()] == list(range(1, done.version + 1))
    assert [saved.text for saved in await task.texts() if saved.step == "s1"] == [SENTENCE]
    assert task.id in [summary.task_id async for summary in octo.tasks(status="completed")]


async def test_pages_are_walked_to_the_end(octo):
    made = [(await octo.submit(GOAL, files=FILES)).id for _ in range(3)]
    page = await octo.task_page(limit=2)
    following = await octo.task_page(limit=2, cursor=page.cursor)
    assert not {task.task_id for task in page.tasks} & {task.task_id for task in following.tasks}
    assert set(made) <= {task.task_id async for task in octo.tasks()}
    for task_id in made:
        await octo.task(task_id).wait()


async def test_one_key_is_one_task(octo):
    key = f"key-{id(octo)}"
    first, second = [await octo.submit(GOAL, files=FILES, idempotency_key=key) for _ in range(2)]
    assert first.id == second.id
    await first.wait()


@pytest.mark.parametrize("file", [b"plain", ("a.txt", "text"), ("b.txt", b"bytes")])
async def test_files_go_there_and_back(octo, file):
    stored = await octo.upload(file)
    body = await octo.download(stored)
    assert hashlib.sha256(body).hexdigest() == stored.digest
    assert body in (b"plain", b"text", b"bytes")


async def test_a_stored_file_is_submitted_without_sending_it_again(octo):
    stored = await octo.upload(("notes.txt", "stored before"))
    task = await octo.submit(GOAL, files=[*FILES, stored, ("more.txt", "sent along")])
    names = [file.name for file in (await task.read()).files]
    assert names[-2:] == ["notes.txt", "more.txt"]
    # Only its digest goes along: one that names nothing stored is refused.
    with pytest.raises(APIError) as caught:
        await octo.submit(GOAL, files=[msgspec.structs.replace(stored, digest="0" * 64)])
    assert caught.value.code == "file_invalid"
    await task.cancel()


async def test_paths_of_one_name_are_named_after_their_folders(tmp_path: Path):
    for folder in ("v1", "v2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "offer.txt").write_text(folder)
    paths = [tmp_path / "v1" / "offer.txt", str(tmp_path / "v2" / "offer.txt")]
    loaded = await load_files([("terms.txt", "x"), *paths])
    assert [file.name for file in loaded] == ["terms.txt", "v1-offer.txt", "v2-offer.txt"]


async def test_two_contents_of_one_name_are_refused(octo):
    with pytest.raises(InvalidRequest, match=r"Two files are named a\.txt"):
        await octo.submit(GOAL, files=[("a.txt", "one"), ("a.txt", "two")])


async def test_a_file_that_is_not_there_is_refused_before_anything_is_sent(octo, tmp_path: Path):
    with pytest.raises(InvalidRequest, match="There is no file") as caught:
        await octo.submit(GOAL, files=[tmp_path / "missing"])
    assert caught.value.code == "file_invalid"


async def test_a_text_that_is_not_utf_8_is_refused_before_anything_is_sent(octo):
    wrong = "caf\udce9"  # what Python makes of the byte E9 in an argument or a file name
    for call in (
        octo.submit(wrong),
        octo.submit("Go", files=[(wrong, b"x")]),
        octo.submit("Go", files=[("a.txt", wrong)]),
        octo.task(wrong).read(),
        octo.memory.fact(wrong),
        anext(octo.task(wrong).updates()),
    ):
        with pytest.raises(InvalidRequest, match=r"A text is not UTF-8: 'caf\\udce9'"):
            await call


async def test_a_cancelled_task_is_told_by_type_and_cancelling_it_again_is_fine(octo, kit):
    kit.answer_with(ScriptedReply("The service ", hangs=True))
    task = await octo.submit(GOAL, files=FILES)
    with pytest.raises(DeadlineExceeded):
        await task.result(timeout=0.3)
    assert (await task.cancel()).status == "cancelled"
    assert (await task.cancel()).status == "cancelled"
    with pytest.raises(TaskCancelled) as caught:
        await task.result()
    assert caught.value.task.task_id == task.id


async def test_a_failed_task_is_told_with_its_code_and_cannot_be_cancelled(octo, kit):
    task = await octo.submit(GOAL, files=FILES, budget={"max_tokens": 20})
    with pytest.raises(TaskFailed) as caught:
        await task.result(timeout=30)
    assert caught.value.code == "budget_exhausted"
    assert caught.value.task.status == "failed"
    with pytest.raises(Conflict):
        await task.cancel()


async def test_a_misspelt_budget_is_pointed_at(octo):
    with pytest.raises(InvalidRequest) as caught:
        await octo.submit(GOAL, budget={"max_token": 3})
    assert caught.value.code == "unknown_field"
    assert caught.value.status == 400
    assert caught.value.request_id.startswith("req-")
    with pytest.raises(InvalidRequest) as caught:
        await octo.submit("  ")
    assert [fault.pointer for fault in caught.value.field_errors] == ["/goal"]


async def test_what_is_not_there_is_not_found(octo):
    for asking in (octo.task(NOBODY).read(), octo.task(NOBODY).result(), octo.download("0" * 64)):
        with pytest.raises(NotFound):
            await asking
    with pytest.raises(NotFound) as caught:
        async for _ in octo.task(NOBODY).updates():
            pass
    assert caught.value.code == "task_not_found"


async def test_keys_open_what_their_scope_says(octo, kit):
    made = await octo.admin.create_key("reader", scope="tasks:read")
    assert made.secret not in repr(await octo.admin.keys())
    async with octollm.connect(kit.url, made.secret) as reader:
        assert made.secret not in repr(reader._transport)
        assert (await reader.task_page()).tasks is not None
        with pytest.raises(PermissionDenied) as caught:
            await reader.submit(GOAL)
        assert caught.value.code == "scope_missing"
    await octo.admin.revoke_key(made.key.id)
    async with octollm.connect(kit.url, made.secret) as reader:
        with pytest.raises(AuthenticationError):
            await reader.task_page()
        with pytest.raises(AuthenticationError):
            async for _ in reader.task(NOBODY).updates():
                pass


async def test_a_token_opens_its_service_only(octo):
    token = await octo.admin.mint_token("judge:validate", aud="judge", lifetime_seconds=60)
    assert token.scope == "judge:validate"
    with pytest.raises(InvalidRequest):
        await octo.admin.mint_token("judge:validate", aud="coder")


async def test_the_log_is_followed_from_where_one_says(octo):
    task = await octo.submit(GOAL, files=FILES)
    await task.wait()
    seen = []
    async with asyncio.timeout(20), contextlib.aclosing(octo.events()) as events:
        async for event in events:
            seen.append(event.seq)
            if event.subject == f"task/{task.id}" and event.event_type == "task.completed":
                break
    assert seen == sorted(set(seen))
    page = await octo.event_page(after=seen[-2], limit=1)
    assert [event.seq for event in page.events] == [seen[-1]]


async def test_the_installation_tells_of_itself(octo):
    assert (await octo.health()).service == "reflex"
    assert (await octo.ready()).status == "ready"
    assert {"coder", "judge"} <= {arm.name for arm in await octo.arms()}


async def test_text_and_frames_survive_cuts_in_the_middle_of_tokens(octo, kit):
    words = " ".join(f"{number:05d}é" for number in range(9000))
    kit.answer_with(ScriptedReply(f"{SENTENCE}\n\n{words}", chunk_size=100))
    async with cutting(kit.url, least=2500, longest=6000, most=24) as proxy:
        # Submitted past the proxy: only the watching is cut.
        task = await octo.submit(GOAL, files=FILES)
        async with octollm.connect(proxy.url) as through, asyncio.timeout(120):
            updates = [update async for update in through.task(task.id).updates()]
    assert proxy.cuts >= 10
    assert [update.seq for update in updates if update.type != "token"] == list(range(1, updates[-1].seq + 1))
    text = ""
    for update in updates:
        if update.type == "token" and update.step == "s1":
            text = "" if update.reset else text
            assert update.offset == len(text) or update.reset
            text += update.text
    assert text == f"{SENTENCE}\n\n{words}"
    assert updates[-1].type == "result"


async def test_the_log_survives_cuts(kit):
    async with octollm.connect(kit.url) as octo:
        for _ in range(3):
            await (await octo.submit(GOAL, files=FILES)).wait()
        whole = (await octo.event_page(limit=500)).events
        async with cutting(kit.url, least=900, longest=3000, most=10) as proxy, octollm.connect(proxy.url) as through:
            seen = []
            async with asyncio.timeout(60), contextlib.aclosing(through.events()) as events:
                async for event in events:
                    seen.append(event.seq)
                    if event.seq >= whole[-1].seq:
                        break
    assert proxy.cuts >= 5
    assert [seq for seq in seen if seq <= whole[-1].seq] == [event.seq for event in whole]


def client_threads():
    return {thread for thread in threading.enumerate() if thread.name == "octollm-client"}


def test_no_thread_is_left_and_a_closed_client_says_so(kit, caplog):
    before = client_threads()
    with octollm.connect_sync(kit.url) as octo:
        octo.health()
        events = octo.events()
        next(events)
        assert client_threads() > before
    assert client_threads() == before
    assert not [record for record in caplog.records if "asynchronous generator" in record.message]
    events.close()
    with pytest.raises(OctoError, match="closed"):
        octo.health()
    octo.close()


class RecordingTransport(GatewayTransport):
    """A gateway that notes what it is asked."""

    asked: set[tuple[str, str]]

    async def send(self, method, path, *args, **kwargs):
        self.asked.add((method, path.partition("?")[0]))
        return await super().send(method, path, *args, **kwargs)

    def stream(self, path, *args):
        self.asked.add(("GET", path.partition("?")[0]))
        return super().stream(path, *args)


ELSEWHERE = {
    ("GET", "/tasks/{task_id}/events"): "the frames of the WebSocket, which updates() reads",
    ("GET", "/dashboard/events"): "for pages: /client.js watches the dashboard",
    ("GET", "/metrics"): "for Prometheus",
    ("GET", "/openapi.json"): "for tools",
    ("GET", "/docs"): "for readers",
    ("GET", "/.well-known/jwks.json"): "for those who verify tokens",
    ("POST", "/hooks/{hook}"): "for the systems that send webhooks",
    ("POST", "/session"): "for the page, whose browser keeps the cookie",
    ("DELETE", "/session"): "for the page",
    ("GET", "/session/issuers"): "for the page",
    ("GET", "/asyncapi.json"): "a description, for programs",
}
"""What the gateway offers that needs no method, and why."""


async def test_every_public_endpoint_has_a_method(kit):
    clock = SystemClock()
    gateway = RecordingTransport([kit.url], None, clock=clock, ids=Uuid7Generator(clock))
    gateway.asked = set()
    async with AsyncClient._from_transport(gateway) as octo, httpx.AsyncClient(base_url=kit.url) as plain:
        task = await octo.submit(GOAL, files=FILES)
        async for _ in task.updates():
            pass
        view = await task.result()
        await octo.task_page()
        await octo.approvals()
        used = {row.name: row for row in (await octo.usage("model", days=1)).rows}
        assert sum(row.tokens for row in used.values()) > 0
        assert task.id in [each.task_id async for each in octo.tasks(text=GOAL[:10].upper())]
        assert [each async for each in octo.tasks(text="no goal has this")] == []
        with contextlib.suppress(Conflict):
            await task.approve()
        [_ async for _ in task.history()]
        [attempt] = [attempt async for attempt in task.attempts()]
        assert (await task.recording()).task_id == task.id
        assert (attempt.step, attempt.status) == ("s1", "accepted")
        kit.answer_with(ScriptedReply("The service ", hangs=True))
        retried = await task.retry()
        assert (await retried.pause()).status == "paused"
        assert [each.text for each in (await retried.instruct("Be brief.")).instructions] == ["Be brief."]
        assert (await retried.extend(max_tokens=90_000)).budget.max_tokens == 90_000
        assert (await retried.resume()).status != "paused"
        with contextlib.suppress(Conflict):
            await task.skip("s1")
        forked = await task.fork("s1")
        for again in (retried, forked):
            assert (await again.read()).forked_from == task.id
            with contextlib.suppress(Conflict):
                await again.cancel()
        kit.answer = default_reply
        await task.texts()
        with contextlib.suppress(Conflict):
            await task.cancel()
        with contextlib.suppress(NotFound):
            await task.artifact("0" * 64)
        await octo.download(view.files[0].digest)
        async with contextlib.aclosing(octo.events()) as events:
            await anext(events)
        await octo.arms()
        made = await octo.admin.create_key("all")
        await octo.admin.keys()
        await octo.admin.revoke_key(made.key.id)
        await task.trace()
        joined = await octo.admin.create_enrolment_token("translator", calls=["models:chat"])
        assert [join.id for join in await octo.admin.enrolment_tokens()] == [joined.join.id]
        await octo.admin.revoke_enrolment_token(joined.join.id)
        with contextlib.suppress(InvalidRequest):
            await octo.admin.remove_arm("translator")
        hook = (await octo.admin.create_hook("ci", scheme="github", template=HookTemplate("Look"))).hook
        assert await octo.admin.hooks() == (hook,)
        assert await octo.admin.hook(hook.id) == hook
        await octo.admin.rotate_hook(hook.id, overlap_seconds=0)
        await octo.admin.delete_hook(hook.id)
        request = WebhookRequest("https://hooks.example.com/in", ("events:task:*",))
        webhook = (await octo.admin.create_webhook(request)).webhook
        assert [each.id for each in await octo.admin.webhooks()] == [webhook.id]
        assert (await octo.admin.webhook(webhook.id)).url == request.url
        await octo.admin.update_webhook(webhook.id, request)
        await octo.admin.rotate_webhook(webhook.id)
        await octo.admin.replay_webhook(webhook.id)
        await octo.admin.webhook_deliveries(webhook.id, state="dead")
        assert not (await octo.admin.test_webhook(webhook.id)).delivered
        await octo.admin.delete_webhook(webhook.id)
        await octo.admin.mint_token("judge:validate", aud="judge")
        await octo.admin.revoke_token("no-such-token")
        await octo.admin.audit()
        await use_memory(octo.memory)
        await use_subscriptions(octo.subscriptions)
        started = await use_schedules(octo.schedules, await octo.upload(FILES[0]))
        await octo.task(started).result()  # before the next test has the model hang
        await octo.who_am_i()
        assert {each.service for each in await octo.services()} >= {"orchestrator", "coder"}
        await octo.preprocess(GOAL)
        await octo.health()
        await octo.ready()
        paths = (await plain.get("/openapi.json")).json()["paths"]
        offered = {(method.upper(), path) for path, methods in paths.items() for method in methods}
        assert len(offered) > 20
        assert set(ELSEWHERE) <= offered
        for method, path in offered - set(ELSEWHERE):
            pattern = re.compile(re.sub(r"\{\w+\}", "[^/]+", path))
            if any(asked == method and pattern.fullmatch(where) for asked, where in gateway.asked):
                continue
            # Nothing stands behind it yet: the day that something does, it needs a method.
            said = await plain.request(
                method, re.sub(r"\{\w+\}", task.id, path), content=b"{}" if method == "POST" else None
            )
            assert said.json().get("code") == "not_configured", f"no method of the client calls {method} {path}"


async def use_subscriptions(subscriptions) -> None:
    """Call every method of the client of durable subscriptions."""
    made = await subscriptions.put("billing", SubscriptionRequest(patterns=("events:task:*",), start="earliest"))
    assert [each.name for each in await subscriptions.list()] == [made.name]
    [delivery, *_] = await subscriptions.poll("billing", limit=1, wait=5)
    await subscriptions.acknowledge("billing", [delivery.ack_id])
    async with contextlib.aclosing(subscriptions.events("billing")) as events:
        assert (await anext(events)).event_type.startswith("task.")
    assert await subscriptions.replay("billing", after=0) >= 0
    assert await subscriptions.dead_letters("billing") == ()
    for act in (subscriptions.retry_dead_letter, subscriptions.drop_dead_letter):
        with contextlib.suppress(NotFound):
            await act(1)
    assert (await subscriptions.read("billing")).name == "billing"
    await subscriptions.delete("billing")


async def use_schedules(schedules, file) -> str:
    """Call every method of the client of schedules, and return the id of the task that was started."""
    made = await schedules.create("0 7 * * 1", GOAL, time_zone="Europe/Berlin", files=[file])
    assert made.next_run is not None
    assert [each.id for each in await schedules.list()] == [made.id]
    assert (await schedules.pause(made.id)).next_run is None
    assert (await schedules.resume(made.id)).next_run == made.next_run
    started = await schedules.run(made.id)
    assert started.goal == GOAL
    assert (await schedules.read(made.id)).state == "active"
    await schedules.delete(made.id)
    with pytest.raises(NotFound):
        await schedules.read(made.id)
    with pytest.raises(InvalidRequest) as caught:
        await schedules.create("61 * * * *", GOAL)
    assert [fault.pointer for fault in caught.value.field_errors] == ["/cron"]
    return started.task_id


async def use_memory(memory) -> None:
    """Call every method of the memory's client."""
    stored = await memory.put_fact("rate", 19, subject="VAT", valid_from="2021-01-01T00:00:00Z")
    assert await memory.fact("rate", subject="VAT") == stored
    with pytest.raises(Conflict):
        await memory.put_fact("rate", 20, subject="VAT", if_absent=True)
    changed = await memory.put_fact("rate", 20, subject="VAT", if_match=stored.etag, confidence=0.5)
    with pytest.raises(Conflict):
        await memory.erase_fact("rate", subject="VAT", if_match=stored.etag)
    assert [each async for each in memory.facts("vat", min_confidence=0.4)] == [changed]
    assert [each.fact.value for each in await memory.fact_history("rate", subject="VAT")] == [20, 19]
    assert (await memory.erase_fact("rate", subject="VAT", if_match=changed.etag)).versions == 2
    document = await memory.store_document("pumps.txt", "The pump was checked on Monday.")
    assert document.digest in {each.digest async for each in memory.documents()}
    assert await memory.document(document.digest) == document
    [passage] = await memory.search("pump monday", documents=[document.digest])
    assert passage.source == "pumps.txt"
    assert (await memory.erase_document(document.digest)).passages == 1
    with pytest.raises(NotFound):
        await memory.erase_task("task-" + "9" * 32)
    assert (await memory.erase_all()).facts == 0


async def test_a_key_of_the_memory_alone_opens_the_memory_alone(octo, kit):
    made = await octo.admin.create_key("reader", scope="memory:read")
    async with octollm.connect(kit.url, made.secret) as reader:
        assert [each async for each in reader.memory.facts("no such fact")] == []
        for refused in (reader.memory.put_fact("a", 1), reader.memory.erase_all(), reader.task_page()):
            with pytest.raises(PermissionDenied):
                await refused
    tasks = await octo.admin.create_key("tasks", scope="tasks:read")
    async with octollm.connect(kit.url, tasks.secret) as other:
        with pytest.raises(PermissionDenied):
            await other.memory.fact("a")
    await octo.admin.revoke_key(made.key.id)
    async with octollm.connect(kit.url, made.secret) as reader:
        with pytest.raises(AuthenticationError):
            await reader.memory.fact("a")


async def test_the_memory_is_strict_about_members_and_names_its_resources(octo, kit):
    async with httpx.AsyncClient(base_url=kit.url, headers={"Authorization": f"Bearer {kit.key}"}) as plain:
        odd = await plain.put("/memory/facts/a", json={"value": 1, "confidense": 0.5})
        assert (odd.status_code, odd.json()["code"]) == (400, "unknown_field")
        made = await plain.put("/memory/facts/a", json={"value": 1}, params={"subject": "x/y"})
        assert made.headers["location"] == "/memory/facts/a?subject=x%2Fy"
        assert (await plain.get(made.headers["location"])).json()["value"] == 1
        etag = made.headers["etag"]
        assert (await plain.get(made.headers["location"], headers={"If-None-Match": etag})).status_code == 304
        gone = await plain.delete(made.headers["location"], headers={"Idempotency-Key": "k"})
        assert gone.json() == (await plain.delete(made.headers["location"], headers={"Idempotency-Key": "k"})).json()

    async def is_recorded() -> bool:
        rows = (await octo.admin.audit(limit=500)).rows
        return {"memory.erasing", "memory.erased"} <= {row.action for row in rows if row.target == "fact a"}

    await wait_until(is_recorded, description="the erasure is in the audit log")


async def test_leaving_cancels_nothing(kit):
    kit.answer_with(ScriptedReply("The service ", hangs=True))
    async with octollm.connect(kit.url) as octo:
        task = await octo.submit(GOAL, files=FILES)
        async with contextlib.aclosing(task.updates()) as updates:
            async for update in updates:
                if update.type == "token" and update.step == "s1":
                    break
    async with octollm.connect(kit.url) as octo:
        assert (await octo.task(task.id).read()).status == "running"
        await octo.task(task.id).cancel()
        await wait_until(lambda: kit.model.active == 0, description="the model has stopped")
