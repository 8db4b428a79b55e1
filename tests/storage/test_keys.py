from __future__ import annotations

import re

from octollm.contracts.events import EVENT_CATALOGUE, channel_of
from octollm.storage.keys import REDIS_KEYS, RedisKeys


def documented(name: str) -> bool:
    patterns = [re.sub(r"\\\{[^}]*\\\}", r"[^:]+", re.escape(info.name)) for info in REDIS_KEYS]
    return any(re.match(pattern, name) for pattern in patterns)


def test_every_name_is_in_the_register() -> None:
    keys = RedisKeys()
    names = [keys.cancel, keys.watch("t"), keys.text("t")]
    names += [keys.channel(channel_of(kind)) for kind in EVENT_CATALOGUE]
    assert [name for name in names if not documented(name)] == []


def test_the_channels_are_the_public_names() -> None:
    assert RedisKeys().channel("events:task:completed") == "events:task:completed"
    assert RedisKeys().watch("task-1") == "octollm:watch:task-1"


def test_a_prefix_goes_in_front_of_all() -> None:
    keys = RedisKeys(prefix="p:")
    names = [
        keys.cancel,
        keys.channel("events:*"),
        keys.watch("t"),
        keys.text("t"),
    ]
    assert all(name.startswith("p:") for name in names)
    assert len(set(names)) == len(names)
