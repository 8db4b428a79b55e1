from __future__ import annotations

import pytest

from octollm.errors import OctoError
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import RedisClient
from octollm.storage.text_stream import MAX_TEXT, TEXT_HINT, TextStream


async def test_pieces_come_back_in_order(redis: RedisClient, keys: RedisKeys) -> None:
    stream = TextStream(redis, keys)
    await stream.append("t", step="s", attempt=1, run=2, offset=0, text="Grüße ", reset=True)
    await stream.append("t", step="s", attempt=1, run=2, offset=6, text="🐙\n\x00")
    first, second = await stream.read("t")
    assert (first.step, first.attempt, first.run, first.offset, first.text, first.reset) == (
        "s",
        1,
        2,
        0,
        "Grüße ",
        True,
    )
    assert (second.offset, second.text, second.reset) == (6, "🐙\n\x00", False)
    assert list(await stream.read("t", first.id)) == [second]
    assert list(await stream.read("t", second.id)) == []
    assert list(await stream.read("other")) == []


async def test_a_stream_expires_and_can_be_dropped(redis: RedisClient, keys: RedisKeys) -> None:
    stream = TextStream(redis, keys, ttl=100)
    await stream.append("t", step="s", attempt=1, run=1, offset=0, text="x")
    assert 90 < await redis.ttl(keys.text("t")) <= 100
    await stream.delete("t")
    assert list(await stream.read("t")) == []


async def test_a_piece_has_a_bound(redis: RedisClient, keys: RedisKeys) -> None:
    stream = TextStream(redis, keys)
    await stream.append("t", step="s", attempt=1, run=1, offset=0, text="x" * MAX_TEXT)
    with pytest.raises(OctoError) as caught:
        await stream.append("t", step="s", attempt=1, run=1, offset=0, text="x" * (MAX_TEXT + 1))
    assert caught.value.code == "invalid_body"


async def test_an_entry_of_another_form_is_refused(redis: RedisClient, keys: RedisKeys) -> None:
    await redis.stream_add(keys.text("t"), {"what": "this"}, maxlen=10, ttl=10)
    with pytest.raises(OctoError) as caught:
        await TextStream(redis, keys).read("t")
    assert caught.value.code == "peer_protocol"


async def test_watchers_get_a_hint(redis: RedisClient, keys: RedisKeys) -> None:
    pubsub = redis.pubsub()
    await pubsub.subscribe(keys.watch("t"))
    assert (message := await pubsub.receive(5.0)) is not None
    assert message.subscribed
    await TextStream(redis, keys).append("t", step="s", attempt=1, run=1, offset=0, text="x")
    assert (message := await pubsub.receive(5.0)) is not None
    assert message.data == TEXT_HINT
    await pubsub.close()
