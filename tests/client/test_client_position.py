"""Watching goes on where a broken connection stopped: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.server import serve

from octollm.cli.updates import Position, Update, task_updates
from octollm.errors import OctoError

TASK = "task-" + "a" * 32


def event(seq, kind="status", **data):
    return Update(TASK, kind, seq, float(seq), data=data)


def token(text, offset, *, attempt=1, run=1, step="s1", reset=False):
    return Update(
        TASK, "token", 0, 0.0, data={"text": text}, step=step, attempt=attempt, run=run, offset=offset, reset=reset
    )


def test_an_event_counts_once():
    position = Position()
    assert position.take(event(1))
    assert position.take(event(2))
    assert not position.take(event(2))
    assert not position.take(event(1))
    assert position.query() == "after=2"


def test_text_counts_once_and_its_place_is_kept():
    position = Position(4)
    assert position.take(token("ab", 0))
    assert position.take(token("cd", 2))
    assert not position.take(token("cd", 2))
    assert parse_qs(position.query()) == {"after": ["4"], "offset": ["s1.1.1.4"]}


def test_a_newer_run_begins_again_and_an_older_is_over():
    position = Position()
    position.take(token("abcd", 0))
    assert position.take(token("x", 0, run=2, reset=True))
    assert not position.take(token("efgh", 4, run=1))
    assert position.texts == {"s1": (1, 2, 1)}


def test_a_step_that_is_over_has_no_offset():
    position = Position()
    position.take(token("abcd", 0))
    position.take(event(3, "step", step="s1", text_length=4))
    assert position.query() == "after=3"


def test_a_ping_says_nothing():
    assert not Position().take(event(7, "ping"))


@given(st.lists(st.integers(1, 30), max_size=40))
def test_what_is_taken_only_rises(seqs):
    position = Position()
    taken = [seq for seq in seqs if position.take(event(seq))]
    assert taken == sorted(set(taken))


FRAMES = [
    event(1, event_type="task.accepted"),
    event(2, event_type="task.planned"),
    token("he", 0),
    token("llo", 2),
    event(3, "step", step="s1", text_length=5, event_type="step.completed"),
    event(4, "result", event_type="task.completed"),
]


@contextlib.asynccontextmanager
async def door_that_breaks(every, close=1012):
    """Serve FRAMES as the door does, with ``after`` and ``offset``, closing each connection after ``every`` frames."""
    connections = []

    async def handler(socket):
        query = parse_qs(urlsplit(socket.request.path).query)
        connections.append(query)
        after = int(query["after"][0])
        seen = {one.rsplit(".", 3)[0]: int(one.rsplit(".", 1)[1]) for one in query.get("offset", [])}
        sent, last = 0, 0
        for frame in FRAMES:
            if frame.type != "token":
                last = frame.seq
                if frame.seq <= after:
                    continue
            elif last < after or frame.offset + len(frame.text) <= seen.get(frame.step, 0) or after >= 3:
                continue
            await socket.send(msgspec.json.encode(frame).decode())
            sent += 1
            if sent == every and frame.type != "result":
                await socket.close(close)
                return
        await socket.close(1000)

    async with serve(handler, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer k"}), connections


@pytest.mark.parametrize("every", [1, 2, 3, 100])
async def test_breaks_lose_and_double_nothing(every):
    async with door_that_breaks(every) as (door, connections):
        found = [update async for update in task_updates(door, TASK)]
    assert [update.seq for update in found if update.type != "token"] == [1, 2, 3, 4]
    assert "".join(update.text for update in found if update.type == "token") == "hello"
    assert len(connections) == (6 // every if every < 100 else 1)


@pytest.mark.parametrize(
    ("close", "code"), [(4401, "token_missing"), (4403, "scope_missing"), (4404, "task_not_found")]
)
async def test_a_refusal_ends_the_watch(close, code):
    async with door_that_breaks(1, close) as (door, connections):
        with pytest.raises(OctoError) as caught:
            async for _ in task_updates(door, TASK):
                pass
    assert caught.value.code == code
    assert len(connections) == 1


async def test_leaving_early_closes_the_connection():
    gone = asyncio.Event()

    async def handler(socket):
        await socket.send(msgspec.json.encode(FRAMES[0]).decode())
        await socket.wait_closed()
        gone.set()

    async with serve(handler, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        door = SimpleNamespace(url=f"http://127.0.0.1:{port}", headers={})
        async with contextlib.aclosing(task_updates(door, TASK)) as updates:
            async for _ in updates:
                break
        async with asyncio.timeout(5):
            await gone.wait()
