"""Rate, errors and percentiles of a service, computed from the metrics that its instances show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.services.monitor.request_figures import RequestHistory, RequestTotals, parse_metrics
from octollm.telemetry import Metrics


def totals_of(metrics: Metrics) -> RequestTotals:
    return parse_metrics(metrics.text().decode())


def test_the_metrics_of_a_service_are_read_without_probes_and_streams() -> None:
    metrics = Metrics("judge")
    for name, status, seconds in (
        ("validate", 200, 0.004),
        ("validate", 503, 0.2),
        ("accept", 200, 0.03),
        ("health", 200, 0.001),
        ("tasks.events", 200, 250.0),
    ):
        metrics.requests.operation(name).observe(status, seconds)
    totals = totals_of(metrics)
    assert (totals.requests, totals.errors) == (3, 1)
    assert totals.buckets[0.005] == 1
    assert totals.buckets[float("inf")] == 3


def test_the_figures_are_those_between_two_samples_of_each_instance() -> None:
    history, metrics = RequestHistory(), {"a": Metrics("judge"), "b": Metrics("judge")}
    for each in metrics.values():
        each.requests.operation("validate").observe(500, 100.0)
    history.record({name: totals_of(each) for name, each in metrics.items()}, 1000.0)
    assert history.compute().rate is None
    for each in metrics.values():
        for _ in range(98):
            each.requests.operation("validate").observe(200, 0.004)
        each.requests.operation("validate").observe(502, 20.0)
        each.requests.operation("validate").observe(200, 20.0)
    history.record({name: totals_of(each) for name, each in metrics.items()}, 1010.0)
    figures = history.compute()
    assert (figures.rate, figures.error_ratio) == (20.0, 0.01)
    assert figures.percentiles is not None
    p50, p95, p99 = figures.percentiles
    assert 0.0025 < p50 < p95 <= 0.005
    assert 10 < p99 <= 30


def test_a_restart_and_a_lost_instance_give_no_wrong_figures() -> None:
    history = RequestHistory()
    history.record({"a": RequestTotals(900), "b": RequestTotals(5)}, 0.0)
    history.record({"a": RequestTotals(3)}, 10.0)
    assert history.compute().rate is None
    history.record({"a": RequestTotals(13)}, 20.0)
    assert history.compute().rate == 1.0


@given(st.lists(st.floats(0.0, 400.0), min_size=1, max_size=60))
def test_percentiles_rise_and_stay_within_the_buckets(seconds: list[float]) -> None:
    metrics, history = Metrics("judge"), RequestHistory()
    history.record({"a": totals_of(metrics)}, 0.0)
    for each in seconds:
        metrics.requests.operation("validate").observe(200, each)
    history.record({"a": totals_of(metrics)}, 10.0)
    percentiles = history.compute().percentiles
    assert percentiles is not None
    assert list(percentiles) == sorted(percentiles)
    assert 0 <= percentiles[0] <= percentiles[2] <= 300


@pytest.mark.parametrize("text", ["", "octollm_requests_total 3\n", 'other{status="200"} 1\n', "\x00\n"])
def test_anything_else_counts_nothing(text: str) -> None:
    assert parse_metrics(text) == RequestTotals()
