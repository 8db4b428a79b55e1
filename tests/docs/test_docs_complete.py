"""Every setting, event, error code and command has its heading or row, and nothing else does."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram

from octollm.capability import PRESETS
from octollm.cli.app import load_commands
from octollm.cli.up import DEMO_GOAL
from octollm.config import PREFIX, SETTING_SPECS
from octollm.contracts.events import EVENT_CATALOGUE
from octollm.contracts.problems import ERROR_KINDS
from octollm.contracts.services import SERVICES
from octollm.rpc.idempotency import MAX_KEY
from octollm.storage.keys import REDIS_KEYS
from octollm.tasks.state import TASK_TRANSITIONS, is_final
from octollm.telemetry import Metrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONCEPTS = DOCS / "concepts"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])


def headings(name: str) -> dict[str, str]:
    """Return the second-level headings of a page, each with the text below it."""
    parts = re.split(r"(?m)^(#{1,2}) (.+)$", (DOCS / name).read_text())
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {title: text for level, title, text in found if level == "##"}


def test_every_setting_has_a_heading():
    names = {spec.variable for spec in SETTING_SPECS.values()} | {f"{PREFIX}{name.upper()}_URL" for name in SERVICES}
    assert set(headings("settings.md")) == names


@pytest.mark.parametrize("spec", SETTING_SPECS.values(), ids=lambda spec: spec.variable)
def test_every_default_is_told(spec):
    text = headings("settings.md")[spec.variable]
    if spec.default:
        assert f"`{spec.default}`" in text
    else:
        assert "No default" in text or "Default:" in text


def test_every_event_has_a_heading():
    assert set(headings("events.md")) == set(EVENT_CATALOGUE)


@pytest.mark.parametrize("kind", EVENT_CATALOGUE.values(), ids=lambda kind: kind.name)
def test_every_event_tells_its_members(kind):
    text = headings("events.md")[kind.name]
    assert text.strip().startswith("Durable." if kind.durable else "Not durable.")
    for member in kind.required:
        assert f"`{member}`" in text


def test_every_error_has_a_heading():
    assert set(headings("errors.md")) == set(ERROR_KINDS)


@pytest.mark.parametrize("code", ERROR_KINDS)
def test_every_error_tells_its_status_and_more(code):
    text = headings("errors.md")[code].strip()
    assert text.startswith(f"Status {ERROR_KINDS[code].status}. ")
    assert len(text) > 60


def test_every_scope_of_a_preset_is_in_the_table():
    text = (DOCS / "operations.md").read_text()
    for name, scopes in PRESETS.items():
        for scope in scopes:
            [row] = re.findall(rf"(?m)^\| `{re.escape(scope)}` \| (yes|no) \| (yes|no) \|", text)
            assert row[0 if name == "user" else 1] == "yes"


def test_every_service_is_told_with_its_port():
    text = (CONCEPTS / "README.md").read_text()
    for name, info in SERVICES.items():
        assert f"| {name} | {info.port} |" in text


def middle_layers() -> list[str]:
    """Return the packages below the services that do I/O: every ``octollm.*`` layer but the words and the hosts."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    packages = [name.removeprefix("octollm.") for name in layers if "|" not in name]
    above = {"cli", "testing", "installation", "services"}
    return [name for name in packages if name not in above and (ROOT / "src/octollm" / name).is_dir()]


@pytest.mark.parametrize("layer", middle_layers())
def test_a_page_tells_where_a_layer_lives(layer):
    told = [*CONCEPTS.glob("*.md"), DOCS / "arms.md", DOCS / "client.md"]
    assert any(f"src/octollm/{layer}/" in page.read_text() for page in told), layer


def test_every_redis_name_has_its_row():
    rows = re.findall(r"(?m)^\| `([^`]+)` \| (channel|stream|string) \|", (CONCEPTS / "storage.md").read_text())
    # The tenant of a cache is a hash tag, whose braces are a part of the name.
    names = {(key.name.replace("{{tenant}}", "{<tenant>}"), key.kind) for key in REDIS_KEYS}
    assert set(rows) == {(re.sub(r"(?<!\{)\{(\w+)\}", r"<\1>", name), kind) for name, kind in names}


def test_every_concept_page_is_linked_from_the_index():
    index = (CONCEPTS / "README.md").read_text()
    pages = {page.name for page in CONCEPTS.glob("*.md")} - {"README.md"}
    assert pages
    for name in pages:
        assert f"]({name})" in index, name


@pytest.mark.parametrize("page", sorted(CONCEPTS.glob("*.md")), ids=lambda page: page.name)
def test_a_concept_page_shows_its_part_at_work(page):
    text = page.read_text()
    assert page.name == "README.md" or re.search(r"(?m)^```(shell|python)$", text), page
    for path in re.findall(r"`(src/octollm/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def metrics() -> dict[str, str]:
    """Return the kind of each metric that a service exposes, by the name in the exposition format."""
    families = Metrics("orchestrator").registry.collect()
    return {family.name + ("_total" if family.type == "counter" else ""): family.type for family in families}


def metric_rows() -> dict[str, tuple[str, set[str], str]]:
    """Return kind, labels and meaning of each row of the table of metrics, by name."""
    rows = re.findall(
        r"(?m)^\| `(octollm_\w+)` \| (\w+) \| ([^|]*)\| ([^|]+) \|$", (CONCEPTS / "telemetry.md").read_text()
    )
    return {name: (kind, set(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}


def test_every_metric_has_its_row():
    assert len(metrics()) > 10
    assert {name: kind for name, (kind, _labels, _meaning) in metric_rows().items()} == metrics()


def test_every_label_of_a_metric_is_in_its_row():
    instruments = [
        each for each in vars(Metrics("orchestrator")).values() if isinstance(each, Counter | Gauge | Histogram)
    ]
    assert instruments
    rows = metric_rows()
    for each in instruments:
        name = each._name + ("_total" if isinstance(each, Counter) else "")
        assert rows[name][1] == set(each._labelnames), name


def test_every_final_status_is_counted_and_told():
    meaning = metric_rows()["octollm_tasks_total"][2]
    for status in TASK_TRANSITIONS:
        assert (f"`{status}`" in meaning) is is_final(status), status


def test_the_length_of_an_idempotency_key_is_the_one_that_is_checked():
    for text in (headings("errors.md")["invalid_header"], (CONCEPTS / "calls.md").read_text()):
        assert f"1 to {MAX_KEY} printable ASCII characters" in " ".join(text.split())


def test_every_command_is_told():
    text = (DOCS / "operations.md").read_text()
    group = load_commands()
    for name in group.commands:
        assert f"`octollm {name}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.+)$", linked.read_text())
            assert anchor in {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_json_example_is_json(page):
    for block in re.findall(r"(?ms)^```json\n(.*?)^```", page.read_text()):
        json.loads(block)


def test_the_transcript_is_of_the_demo_as_it_is():
    text = (ROOT / "README.md").read_text()
    assert f"\nGoal {DEMO_GOAL}\n" in text
    assert "Task completed in" in text
