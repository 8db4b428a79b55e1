"""A bounded dictionary with least-recently-used eviction."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

_V = TypeVar("_V")


class LruCache(Generic[_V]):
    """A bounded dictionary that drops the least recently used entry."""

    def __init__(self, size: int) -> None:
        self._items: OrderedDict[bytes | str, _V] = OrderedDict()
        self._size = size

    def get(self, key: bytes | str) -> _V | None:
        """Return an item, which is then the most recently used, or ``None``."""
        item = self._items.get(key)
        if item is not None:
            self._items.move_to_end(key)
        return item

    def put(self, key: bytes | str, value: _V) -> None:
        """Add or replace an item; past the size, the least recently used one goes."""
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self._size:
            self._items.popitem(last=False)

    def discard(self, key: bytes | str) -> None:
        """Remove an item if it is there."""
        self._items.pop(key, None)

    def __len__(self) -> int:
        return len(self._items)
