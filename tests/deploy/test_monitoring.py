"""The rules for Prometheus and the dashboard for Grafana: every metric and label that they name exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from octollm.telemetry import Metrics

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())
TARGETS: list[dict[str, Any]] = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [rule["expr"] for rule in RULES] + [target["expr"] for target in TARGETS]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
OF_PROMETHEUS = {"up": {"job", "instance"}}


def known_metrics() -> dict[str, set[str]]:
    """Return the labels of every sample that a service exposes, by its name."""
    metrics = Metrics("judge")
    metrics.requests.operation("validate").observe(200, 0.1)
    for instrument in vars(metrics).values():
        names = getattr(instrument, "_labelnames", ())
        if names:
            instrument.labels(*("x" for _ in names))
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


KNOWN = known_metrics() | OF_PROMETHEUS


def metrics_of(query: str) -> set[str]:
    return set(re.findall(r"\boctollm_\w+", query)) | {
        name for name in (*RECORDED, "up") if re.search(rf"\b{name}\b", query)
    }


def labels_of(query: str) -> set[str]:
    grouped = [label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")]
    return {*grouped, *re.findall(r"(\w+)(?:=~|!~|!=|=)\"", query)}


def labels_available(query: str) -> set[str]:
    labels: set[str] = set()
    for name in metrics_of(query):
        labels |= labels_available(RECORDED[name]) if name in RECORDED else KNOWN[name]
    return labels


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_metrics_and_labels_that_exist(query: str) -> None:
    names = metrics_of(query)
    assert names, "a query is about something"
    assert names <= KNOWN.keys() | RECORDED.keys()
    assert labels_of(query) <= labels_available(query)
    assert query.count("(") == query.count(")")


def test_a_text_names_only_labels_that_its_query_has() -> None:
    texts = [(rule["annotations"]["summary"], rule["expr"]) for rule in RULES if "alert" in rule]
    texts += [(target["legendFormat"], target["expr"]) for target in TARGETS]
    for text, query in texts:
        named = set(re.findall(r"\$labels\.(\w+)", text)) | set(re.findall(r"\{\{(\w+)\}\}", text))
        grouped = labels_of(RECORDED.get(query.split(" ")[0], query)) | (KNOWN["up"] if "up{" in query else set())
        assert named <= grouped, text


def test_the_check_finds_a_name_that_does_not_exist() -> None:
    assert "octollm_nothing_total" not in KNOWN
    assert metrics_of("rate(octollm_nothing_total[5m])") == {"octollm_nothing_total"}
    assert labels_of('sum by (a, b) (x{c=~"1"})') == {"a", "b", "c"}
    assert KNOWN["octollm_requests_total"] == {"service", "operation", "status"}
