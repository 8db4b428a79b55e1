from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octollm.lru import LruCache

KEYS = st.integers(0, 6)
OPERATIONS = st.lists(st.tuples(st.sampled_from(["put", "get", "pop"]), KEYS, st.integers(1, 5)), max_size=60)


def test_the_least_recently_used_entry_is_evicted() -> None:
    cache: LruCache[str, int] = LruCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)


def test_a_value_that_is_too_heavy_alone_is_not_kept() -> None:
    cache: LruCache[str, bytes] = LruCache(9, max_weight=3, weigh=len)
    cache.put("a", b"123")
    cache.put("b", b"1234")
    assert len(cache) == 0


def test_a_replaced_value_no_longer_weighs() -> None:
    cache: LruCache[str, bytes] = LruCache(9, max_weight=4, weigh=len)
    for _ in range(5):
        cache.put("a", b"123")
    cache.put("b", b"1")
    assert len(cache) == 2


@given(OPERATIONS)
def test_it_behaves_as_a_list_in_the_order_of_use(operations: list[tuple[str, int, int]]) -> None:
    cache: LruCache[int, int] = LruCache(4, max_weight=10, weigh=lambda value: value)
    model: list[tuple[int, int]] = []  # least recently used first
    for action, key, value in operations:
        known = dict(model).get(key)
        if action != "put":
            assert (cache.get(key) if action == "get" else cache.pop(key)) == known
        model = [entry for entry in model if entry[0] != key]
        if action == "put":
            cache.put(key, value)
            model.append((key, value))
        elif action == "get" and known is not None:
            model.append((key, known))
        while len(model) > 4 or sum(weight for _, weight in model) > 10:
            del model[0]
        assert len(cache) == len(model)
    assert {key: cache.get(key) for key in range(7)} == {key: dict(model).get(key) for key in range(7)}
