"""The state machine of deliveries: pure rules."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.events import Event
from octollm.services.orchestrator.webhook_attempts import (
    FIRST_PAUSE,
    GIVE_UP_SECONDS,
    LONGEST_PAUSE,
    MAX_RETRY_AFTER,
    PROBING_FAILURES,
    AttemptOutcome,
    ReceiverHealth,
    build_request,
    decide_attempt,
    decide_disabling,
    decide_health,
    probe_pause,
)

STATUSES = st.sampled_from([0, 100, 199, 200, 204, 299, 301, 302, 400, 401, 404, 408, 410, 429, 500, 503])
OUTCOMES = st.builds(AttemptOutcome, STATUSES, st.just("why"), st.none() | st.floats(0, 1e9))
RANDOM = st.floats(0, 1)
EVENT = Event(
    "task.completed", "2025-11-10T10:30:00.000Z", "orchestrator", {"status": "completed"}, "id-1", "acme", "task/1"
)


@given(OUTCOMES, st.integers(1, 1000), st.floats(0, 2 * GIVE_UP_SECONDS), RANDOM)
def test_an_attempt_ends_a_delivery_or_is_followed_by_another_in_time(outcome, attempts, age, random):
    decision = decide_attempt(outcome, attempts=attempts, first_attempt_at=0.0, now=age, random=random)
    assert (decision.state == "delivered") == (200 <= outcome.status < 300)
    if decision.state == "pending":
        assert age < GIVE_UP_SECONDS and outcome.status != 410
        assert FIRST_PAUSE / 2 <= decision.pause <= max(LONGEST_PAUSE, MAX_RETRY_AFTER)
        assert decision.pause >= min(outcome.retry_after or 0, MAX_RETRY_AFTER)
    else:
        assert decision.pause == 0


@given(st.lists(RANDOM, min_size=50, max_size=50))
def test_attempts_spread_over_a_day_and_are_few(jitter):
    now, attempts, pauses = 0.0, 0, []
    for random in jitter:
        attempts += 1
        decision = decide_attempt(AttemptOutcome(500), attempts=attempts, first_attempt_at=0.0, now=now, random=random)
        if decision.state == "dead":
            break
        pauses.append(decision.pause)
        now += decision.pause
    assert GIVE_UP_SECONDS <= now <= GIVE_UP_SECONDS + LONGEST_PAUSE
    assert 10 <= attempts <= 25
    assert pauses[0] <= FIRST_PAUSE


@given(st.lists(OUTCOMES, max_size=30))
def test_health_counts_failures_since_the_last_success(outcomes):
    health, failures, since = ReceiverHealth(), 0, None
    for now, outcome in enumerate(outcomes):
        health = decide_health(health, outcome, float(now))
        if outcome.delivered:
            failures, since = 0, None
        else:
            failures, since = failures + 1, now if since is None else since
        assert health == ReceiverHealth(failures, since)
        assert health.is_probing == (failures >= PROBING_FAILURES)


@given(OUTCOMES, st.integers(0, 100), st.none() | st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_webhook_is_disabled_for_a_day_of_failures_or_at_once_when_it_is_gone(outcome, failures, since, now):
    reason = decide_disabling(ReceiverHealth(failures, since), outcome, now)
    assert bool(reason) == (outcome.status == 410 or (since is not None and now - since >= GIVE_UP_SECONDS))


@given(st.integers(1, 10_000), st.none() | st.floats(0, 1e9), RANDOM)
def test_a_receiver_that_fails_is_left_alone_for_longer_each_time_up_to_five_minutes(failures, retry_after, random):
    pause = probe_pause(ReceiverHealth(failures, 0.0), AttemptOutcome(503, "", retry_after), random)
    asked = min(retry_after or 0.0, MAX_RETRY_AFTER)
    assert asked <= pause <= max(asked, 300)
    assert failures < PROBING_FAILURES or pause >= 1


@pytest.mark.parametrize("body_format", ["octollm", "cloudevents", "cloudevents-binary"])
def test_the_body_has_the_format_of_the_webhook(body_format):
    headers, body = build_request(EVENT, body_format)
    if body_format == "octollm":
        assert (headers["content-type"], msgspec.json.decode(body, type=Event)) == ("application/json", EVENT)
    elif body_format == "cloudevents":
        assert headers["content-type"].startswith("application/cloudevents+json")
        assert (json.loads(body)["specversion"], json.loads(body)["id"]) == ("1.0", "id-1")
    else:
        assert (headers["ce-id"], headers["ce-specversion"], json.loads(body)) == ("id-1", "1.0", EVENT.data)
