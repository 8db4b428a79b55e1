from __future__ import annotations

import re

from octollm.contracts.events import CATALOGUE, channel_of
from octollm.storage.keys import KEYS, Keys


def documented(name: str) -> bool:
    patterns = [re.sub(r"\\\{[^}]*\\\}", r"[^:]+", re.escape(info.name)) for info in KEYS]
    return any(re.match(pattern, name) for pattern in patterns)


def test_every_name_is_in_the_register() -> None:
    keys = Keys()
    names = [keys.log, keys.cancel, keys.watch("t"), keys.text("t")]
    names += [keys.channel(channel_of(kind)) for kind in CATALOGUE]
    assert [name for name in names if not documented(name)] == []


def test_the_channels_are_the_public_names() -> None:
    assert Keys().channel("events:task:completed") == "events:task:completed"
    assert Keys().watch("task-1") == "octollm:watch:task-1"
    assert Keys().log == "octollm:log"


def test_a_prefix_goes_in_front_of_all() -> None:
    keys = Keys(prefix="p:")
    names = [
        keys.log,
        keys.cancel,
        keys.channel("events:*"),
        keys.watch("t"),
        keys.text("t"),
    ]
    assert all(name.startswith("p:") for name in names)
    assert len(set(names)) == len(names)
