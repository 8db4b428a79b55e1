"""A bounded dictionary that evicts the least recently used entry (LRU)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """At most ``capacity`` entries, which together weigh at most ``max_weight``. Not thread-safe.

    ``weigh`` returns the weight of a value, for instance its bytes; without it every entry weighs nothing.
    """

    def __init__(
        self, capacity: int, *, max_weight: int | None = None, weigh: Callable[[V], int] = lambda _value: 0
    ) -> None:
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._capacity = capacity
        self._max_weight = max_weight
        self._weigh = weigh
        self._weight = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """Return the value of ``key`` and count it as used, or ``None``."""
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Set the value of ``key``, and evict the entries that were not used for the longest time."""
        self.pop(key)
        self._entries[key] = value
        self._weight += self._weigh(value)
        while len(self._entries) > self._capacity or (self._max_weight is not None and self._weight > self._max_weight):
            self.pop(next(iter(self._entries)))

    def pop(self, key: K) -> V | None:
        """Remove ``key`` and return its value, or ``None`` when there is none."""
        value = self._entries.pop(key, None)
        if value is not None:
            self._weight -= self._weigh(value)
        return value

    def clear(self) -> None:
        """Remove every entry."""
        self._entries.clear()
        self._weight = 0
