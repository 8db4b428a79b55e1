from octollm.contracts.events import Event
from octollm.services.monitor.health import MAX_SAMPLES, HealthHistory, ProbeResult, combine_probes


def event(event_type: str, **data: object) -> Event:
    return Event(event_type, "2025-11-10T10:30:00Z", "x", data, "id", "system", "s")


def test_a_state_has_its_beginning() -> None:
    history = HealthHistory(["coder"])
    history.record_probe("coder", ProbeResult("up", 0.004, instances=1), 100.0)
    history.record_probe("coder", ProbeResult("up", 0.006, instances=1), 105.0)
    (state,) = history.get_states().services
    assert (state.state, state.since, state.checked_at) == (
        "up",
        "1970-01-01T00:01:40.000Z",
        "1970-01-01T00:01:45.000Z",
    )
    assert state.latency_ms == 6.0
    history.record_probe("coder", ProbeResult("down", detail="gone"), 110.0)
    (state,) = history.get_states().services
    assert (state.state, state.since, state.detail) == ("down", "1970-01-01T00:01:50.000Z", "gone")
    assert [sample.state for sample in state.history] == ["up", "up", "down"]


def test_the_history_is_bounded() -> None:
    history = HealthHistory(["coder"])
    for n in range(MAX_SAMPLES * 2):
        history.record_probe("coder", ProbeResult("up"), float(n))
    assert len(history.get_states().services[0].history) == MAX_SAMPLES


def test_what_was_never_seen_is_unknown() -> None:
    (state,) = HealthHistory(["coder"]).get_states().services
    assert (state.state, state.since, state.history) == ("unknown", None, ())


def test_events_are_counted_and_a_services_own_are_kept() -> None:
    history = HealthHistory(["coder", "memory"])
    history.record_event(event("arm.registered", arm="coder"))
    history.record_event(event("system.degraded", service="memory", reason="disk"))
    history.record_event(event("task.completed", task_id="t", service="memory"))
    history.record_event(event("system.started", service="stranger"))
    history.record_event(event("system.started", service=["no", "name"]))
    states = history.get_states()
    assert states.events == 5
    assert [state.last_event for state in states.services] == ["arm.registered", "system.degraded"]


def test_instances_are_judged_together() -> None:
    assert combine_probes([]).state == "unknown"
    assert combine_probes([(True, 0.1, ""), (True, 0.3, "")]) == ProbeResult("up", 0.3, "", 2)
    assert combine_probes([(True, 0.1, ""), (False, 0, "gone")]) == ProbeResult("degraded", 0.1, "gone", 2)
    assert combine_probes([(False, 0, "gone"), (False, 0, "gone")]) == ProbeResult("down", 0.0, "gone", 2)
