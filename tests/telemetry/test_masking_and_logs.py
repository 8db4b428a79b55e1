from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.clock import SystemClock
from octollm.context import RequestContext, TraceContext, parse_traceparent, set_context, start_trace
from octollm.masking import mask_text
from octollm.telemetry import configure_logging, get_logger, mask
from octollm.testing import wait_until

JWT = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ4In0.c2ln"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"Authorization: Bearer {JWT}~{JWT}", JWT),
        ("key octo_0190_abcdefghijkl was used", "octo_0190_abcdefghijkl"),
        ("provider key sk-live-1234567890", "sk-live-1234567890"),
        ("redis://user:hunter2@host:6379/0", "hunter2"),
        ("redis://:hunter2@host", "hunter2"),
    ],
)
def test_secrets_are_masked_by_their_look(text: str, secret: str) -> None:
    assert secret not in mask_text(text)


@pytest.mark.parametrize("name", ["Authorization", "api_key", "apiKey", "password", "client_secret", "Cookie", "token"])
def test_secrets_are_masked_by_their_name(name: str) -> None:
    assert "s3cr3t" not in str(mask({"a": [{name: "s3cr3t"}]}))


def test_plain_words_stay() -> None:
    assert mask({"tokens": 5, "goal": "a key question", "max_tokens": 7}) == {
        "tokens": 5,
        "goal": "a key question",
        "max_tokens": 7,
    }


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_anything_can_be_masked(value: object) -> None:
    msgspec.json.encode(mask(value))


def test_a_line_has_the_ids_of_the_work_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "octollm.jsonl"
    with configure_logging(path, level="info", clock=SystemClock()):
        set_context(RequestContext("coder", "req-1", "corr-1", TraceContext("a" * 32, "b" * 16), "task-1", "s1"))
        get_logger("coder").info("call.served", status=200, authorization="Bearer x")
        get_logger("coder").debug("not.written")
        get_logger("coder").error("call.crashed", error=ValueError(f"bad {JWT}"))
        logging.getLogger("some.library").warning("trouble with %s", "redis://u:pw@h")
        set_context(RequestContext())
    lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    first = lines[0]
    assert (first["service"], first["event"], first["request_id"]) == ("coder", "call.served", "req-1")
    assert (first["trace_id"], first["task_id"], first["step"]) == ("a" * 32, "task-1", "s1")
    assert first["authorization"] == "***"
    assert "not.written" not in path.read_text()
    assert lines[1]["error"].startswith("ValueError: bad")
    assert JWT not in path.read_text()
    assert lines[2]["library"] == "some.library"
    assert "pw" not in lines[2]["message"]


@given(st.text())
def test_a_malformed_traceparent_starts_a_new_trace(text: str) -> None:
    found = parse_traceparent(text)
    assert found is None or found.traceparent[:52] == text[:52]


def test_a_trace_keeps_its_id_over_hops() -> None:
    trace = start_trace()
    again = parse_traceparent(trace.child().traceparent)
    assert again is not None
    assert again.trace_id == trace.trace_id
    assert parse_traceparent("00-" + "0" * 32 + "-" + "1" * 16 + "-01") is None


async def test_lines_are_written_while_the_process_runs_on(tmp_path: Path) -> None:
    path = tmp_path / "octollm.jsonl"
    with configure_logging(path, level="info", clock=SystemClock()):
        get_logger("coder").info("call.served")
        await wait_until(lambda: path.read_bytes().count(b"\n") == 1, description="the line is written")
        get_logger("coder").warning("call.refused")
        assert path.read_bytes().count(b"\n") == 2


def test_lines_of_several_threads_are_all_written(tmp_path: Path) -> None:
    path = tmp_path / "octollm.jsonl"
    with configure_logging(path, level="info", clock=SystemClock()):
        log = get_logger("coder")
        threads = [threading.Thread(target=lambda: [log.info("line") for _ in range(400)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = path.read_bytes().splitlines()
    assert len(lines) == 1600
    assert all(msgspec.json.decode(line)["event"] == "line" for line in lines)
