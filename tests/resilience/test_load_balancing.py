from __future__ import annotations

import itertools
import random as randoms

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.resilience import Balancer, CallOutcome, Ejection, EjectionPolicy, Instance, Recovery

POLICY = EjectionPolicy()


def balancer(count: int, seed: int = 0) -> Balancer:
    found = Balancer(randoms.Random(seed).randrange, POLICY)
    found.update_instances(tuple(f"http://{number}" for number in range(count)), 0)
    return found


def pick(found: Balancer, now: float, operation: str = "op") -> Instance:
    instance = found.pick(operation, now)
    assert instance is not None
    return instance


def fail(found: Balancer, instance: Instance, now: float, times: int = POLICY.consecutive_failures) -> None:
    for _ in range(times):
        instance.in_flight += 1
        found.record_outcome(instance, "op", "failed", 0.0, now)


def test_a_lone_instance_that_fails_is_left_alone_then_probed() -> None:
    found = balancer(1)
    fail(found, found.instances[0], 1)
    assert found.pick("op", 5.9) is None
    assert found.seconds_until_available(2) == 4
    probe = pick(found, 6)
    assert found.pick("op", 6) is None  # one at a time
    ejected = found.record_outcome(probe, "op", "failed", 0.0, 6)
    assert ejected == Ejection(probe.url, "failing", 10, reopened=True)  # twice as long
    probe = pick(found, 16)
    assert found.record_outcome(probe, "op", "answered", 0.01, 16) == Recovery(probe.url)
    assert [pick(found, 16), pick(found, 16)] == [probe, probe]


def test_what_one_operation_cannot_do_does_not_close_a_lone_instance() -> None:
    found = balancer(1)
    for _ in range(20):
        found.record_outcome(pick(found, 0), "op", "erred", 0.01, 0)
    assert pick(found, 0)


def test_calls_that_began_before_an_ejection_do_not_prolong_it() -> None:
    found = balancer(1)
    before = [pick(found, 0) for _ in range(20)]
    for instance in before:
        found.record_outcome(instance, "op", "failed", 1.0, 1)
    assert found.seconds_until_available(1) == 5
    assert found.instances[0].in_flight == 0


@given(st.integers(2, 9))
def test_when_all_are_bad_half_stay_in(count: int) -> None:
    found = balancer(count)
    for instance in found.instances:
        fail(found, instance, 1)
    assert sum(instance.breaker.is_open for instance in found.instances) == count // 2
    assert pick(found, 1)


def test_an_instance_that_is_far_slower_than_its_peers_is_ejected_and_comes_back() -> None:
    found = balancer(3)
    slow = found.instances[2]
    now = 0.0
    for _ in range(200):
        now += 0.01
        instance = pick(found, now)
        found.record_outcome(instance, "op", "answered", 1.0 if instance is slow else 0.01, now)
    # Balancing alone leaves it alone after a call or two; enough of them eject it.
    for _ in range(POLICY.consecutive_slow):
        slow.in_flight += 1
        found.record_outcome(slow, "op", "answered", 1.0, now)
    assert slow.breaker.is_open
    assert slow not in [pick(found, now) for _ in range(50)]
    later = now + 6
    assert pick(found, later) is slow
    found.record_outcome(slow, "op", "answered", 0.01, later)
    assert not slow.breaker.is_open


def test_a_hung_instance_is_ejected_by_the_callers_deadlines() -> None:
    found = balancer(3)
    for instance in found.instances[:2]:
        for _ in range(5):
            instance.in_flight += 1
            found.record_outcome(instance, "op", "answered", 0.01, 1)
    hung = found.instances[2]
    for _ in range(POLICY.consecutive_slow):
        hung.in_flight += 1
        found.record_outcome(hung, "op", "late", 0.5, 1)
    assert hung.breaker.is_open


def test_deadlines_that_all_miss_eject_nobody() -> None:
    found = balancer(3)
    for _ in range(30):
        found.record_outcome(pick(found, 1), "op", "late", 0.2, 1)
    assert not any(instance.breaker.is_open for instance in found.instances)


def test_an_instance_that_failed_the_call_or_asked_for_a_pause_comes_last() -> None:
    found = balancer(3)
    first, second, third = found.instances
    second.busy_until = 10
    for _ in range(20):
        chosen = found.pick("op", 5, {first.url})
        assert chosen is third
        found.record_outcome(third, "op", "answered", 0.01, 5)
    assert found.pick("op", 5, {first.url, third.url}) is not None


def test_what_is_gone_is_forgotten_and_what_stays_is_known() -> None:
    found = balancer(3)
    kept = found.instances[1]
    kept.record_latency("op", 1.0, 0)
    found.update_instances(("http://1", "http://7"), 1)
    assert [instance.url for instance in found.instances] == ["http://1", "http://7"]
    assert found.instances[0] is kept


def test_load_goes_where_calls_are_short() -> None:
    found = balancer(2)
    quick, slow = found.instances
    counts = {quick.url: 0, slow.url: 0}
    under_way: list[tuple[float, Instance, float]] = []
    for step in range(2000):
        now = step * 0.001
        for end, instance, took in [each for each in under_way if each[0] <= now]:
            found.record_outcome(instance, "op", "answered", took, end)
        under_way = [each for each in under_way if each[0] > now]
        instance = pick(found, now)
        took = 0.002 if instance is quick else 0.02
        counts[instance.url] += 1
        under_way.append((now + took, instance, took))
    assert counts[quick.url] > 5 * counts[slow.url]


OUTCOMES: list[CallOutcome] = ["answered", "erred", "failed", "late", "unknown"]


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(OUTCOMES), st.floats(0, 2), st.floats(0, 3), st.booleans()), max_size=150),
    st.integers(0, 100),
)
def test_whatever_happens_somebody_is_called_again(
    count: int, calls: list[tuple[CallOutcome, float, float, bool]], seed: int
) -> None:
    found = balancer(count, seed)
    now = 0.0
    under_way: list[tuple[Instance, CallOutcome, float]] = []
    for outcome, took, pause, ends in calls:
        now += pause
        instance = found.pick("op", now)
        if instance is None:
            assert found.seconds_until_available(now) > 0
        else:
            under_way.append((instance, outcome, took))
        if ends:
            for each, ended, seconds in under_way:
                found.record_outcome(each, "op", ended, seconds, now)
            under_way = []
        ejected = sum(each.breaker.is_open for each in found.instances)
        assert ejected <= max(count // 2, 1 if count == 1 else 0)
        assert all(each.in_flight >= 0 for each in found.instances)
    for each, ended, seconds in under_way:
        found.record_outcome(each, "op", ended, seconds, now)
    assert found.pick("op", now + POLICY.max_ejection_seconds + 1) is not None
    assert sum(each.in_flight for each in found.instances) == 1


@pytest.mark.parametrize("samples", [[1.0], [0.1, 1.0], [1.0, 0.1]])
def test_latency_rises_at_once_and_falls_slowly(samples: list[float]) -> None:
    instance = Instance("http://x", 0)
    for number, seconds in enumerate(samples):
        instance.record_latency("op", seconds, number * 0.1)
    assert instance.latencies["op"].seconds > 0.5
    instance.record_latency("op", 0.1, 60)
    assert instance.latencies["op"].seconds < 0.11


def test_one_slow_call_does_not_keep_an_instance_from_being_asked_for_ever() -> None:
    indices = itertools.cycle([0, 0])  # the first two of three, again and again
    balancer = Balancer(lambda _count: next(indices))
    balancer.update_instances(["a", "b", "c"], 0.0)
    first = balancer.instances[0]
    first.record_latency("op", 2.0, 0.0)
    for other in balancer.instances[1:]:
        other.record_latency("op", 0.1, 0.0)
    assert balancer.pick("op", 1.0) is not first
    balancer.instances[1].record_latency("op", 0.1, 60.0)
    assert balancer.pick("op", 60.0) is first
