"""The level of the whole system: each question over the public API of an installation of its own, and its verdict."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from answer_corpus.model import Case, Question

import octollm
from octollm.contracts.api import TaskView

VERDICTS = ("right", "told", "refused", "wrong", "not answered")
TASK_SECONDS = 300
START_SECONDS = 180
MAX_COLUMNS = 4
"""Columns of a result that still answers a question for one value."""


@dataclass(frozen=True)
class Asked:
    """A question of the corpus. ``kind`` is the row of the report: that of its case, or ``absent``."""

    id: str
    kind: str
    case: Case
    question: Question


@dataclass(frozen=True)
class Verdict:
    """``right``; ``told``: the file does not decide it, and the answer says so; ``refused``, as it should be; ``wrong``
    without a word of doubt; or ``not answered``, although the file has the answer.

    ``cited`` says whether the place was cited that has the answer; ``None`` where none is known.
    """

    id: str
    kind: str
    verdict: str
    seconds: float
    answer: str
    cited: bool | None = None


def list_questions(cases: Sequence[Case]) -> list[Asked]:
    found: list[Asked] = []
    for case in cases:
        for number, question in enumerate(case.questions):
            is_absent = case.kind == "document" and question.is_absent
            found.append(Asked(f"{case.id}#{number}", "absent" if is_absent else case.kind, case, question))
    return found


def choose_sample(asked: Sequence[Asked], size: int) -> list[Asked]:
    """Return a sample in which each kind has its share, and at least one question. It is the same each time."""
    by_kind: defaultdict[str, list[Asked]] = defaultdict(list)
    for each in asked:
        by_kind[each.kind].append(each)
    chosen: list[Asked] = []
    for kind, members in by_kind.items():
        share = max(1, round(size * len(members) / len(asked)))
        chosen += random.Random(f"sample {kind}").sample(members, min(share, len(members)))
    # In an order in which an interrupted run has seen every kind.
    return random.Random("order").sample(chosen, len(chosen))


@contextlib.contextmanager
def installation(model: str, port_offset: int) -> Iterator[octollm.Client]:
    """Run an installation of its own with an embedded model, and yield a client of it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "OCTOLLM_HOME": folder,
            "OCTOLLM_PORT_OFFSET": str(port_offset),
            "OCTOLLM_MODEL": f"embedded:{model}",
        }
        command = [str(Path(sys.executable).with_name("octollm")), "up"]
        log = Path(folder, "up.log")
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            with octollm.Client(f"http://127.0.0.1:{8000 + port_offset}") as client:
                _wait_until_ready(client, process, log)
                yield client
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(client: octollm.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(octollm.OctoError):
            if client.ready().status == "ready":
                return
        time.sleep(0.5)
    raise RuntimeError(f"the installation did not start: {log.read_text('utf-8', 'replace')[-2000:]}")


def ask(client: octollm.Client, asked: Asked) -> Verdict:
    """Ask one question and judge what comes back."""
    began = time.perf_counter()
    try:
        task = client.submit(
            asked.question.text, files=list(asked.case.files.items()), budget={"max_time_seconds": TASK_SECONDS}
        )
        result = task.result(timeout=TASK_SECONDS + 60)
    except octollm.TaskFailed as error:
        verdict, cited, answer = judge_failure(asked.case, error.code), None, f"{error.code}: {error.detail}"
        answer += "".join(f"; {reason}" for reason in error.reasons[:2])
    except octollm.OctoError as error:
        verdict, cited, answer = judge_failure(asked.case, error.code), None, f"{error.code}: {error.detail}"
    else:
        verdict, cited = judge_answer(asked.case, asked.question, result)
        answer = result.output
    return Verdict(asked.id, asked.kind, verdict, round(time.perf_counter() - began, 2), answer[:1500], cited)


def judge_failure(case: Case, code: str) -> str:
    """Return the verdict on a task that failed. Nothing said about an undecided file is not wrong."""
    return "refused" if code in case.refusals or (case.is_open and code != "deadline_exceeded") else "not answered"


def judge_answer(case: Case, question: Question, task: TaskView) -> tuple[str, bool | None]:
    """Return the verdict on a completed task, and whether it cites the right place."""
    evidence = [step.evidence for step in task.steps if step.evidence is not None]
    is_found = all(each.found for each in evidence)
    # The check of a question over documents is told in a note of the answer.
    told = any(not each.decided for one in evidence for each in one.assumptions) or any(
        each.name == "question" and not each.passed for one in evidence for each in one.checks
    )
    if any(text in task.output for text in question.never):
        return "wrong", None
    if case.refusals or case.is_open:
        return ("told" if told else "not answered" if not is_found else "wrong"), None
    if question.is_absent:
        return ("right" if not is_found else "told" if told else "wrong"), None
    if not is_found:
        return "not answered", None
    cited = None
    if question.place:
        cited = any(question.place in citation.location for each in evidence for citation in each.citations)
    if question.rows:
        is_right = any(each.kind == "data" for each in evidence) and matches_rows(
            parse_result(task.output), question.rows
        )
    else:
        is_right = all(_says(_without_citations(task.output), value) for value in question.values)
    return ("right" if is_right else "told" if told else "wrong"), cited


def parse_result(output: str) -> list[list[str]]:
    """Return the rows of the answer of a query."""
    lines = output.split("\n\n", 1)[0].split("\n")
    if len(lines) > 1 and set(lines[1]) <= set("-| "):
        return [line.split(" | ") for line in lines[2:]]
    # The values of a single row, each with the name of its column.
    return [[line.partition(": ")[2] for line in lines]]


def matches_rows(found: Sequence[Sequence[str]], expected: Sequence[tuple[Any, ...]]) -> bool:
    """Say whether each expected row is there, and no other."""
    if len(found) != len(expected) or (len(expected) == 1 and len(found[0]) > MAX_COLUMNS):
        return False
    left = [list(row) for row in found]
    for row in expected:
        at = next(
            (i for i, cells in enumerate(left) if all(any(same_value(c, cell) for c in cells) for cell in row)), None
        )
        if at is None:
            return False
        del left[at]
    return True


def same_value(text: str, expected: Any) -> bool:
    """Say whether a text of an answer is a value. A number may be rounded to two places."""
    text = text.strip()
    if isinstance(expected, bool):
        return text.lower() == str(expected).lower()
    if isinstance(expected, int | float):
        with contextlib.suppress(ValueError):
            return abs(float(text) - expected) <= max(
                0.0051 if isinstance(expected, float) else 0, 1e-9 * abs(expected)
            )
        return False
    if isinstance(expected, datetime):
        return text.replace(" ", "T").startswith(expected.isoformat())
    if isinstance(expected, date):
        return text.startswith(expected.isoformat())
    return text.casefold() == str(expected).casefold()


def _without_citations(output: str) -> str:
    return output.split("\n\n[", 1)[0]


def _says(answer: str, value: str) -> bool:
    """Say whether an answer has one of the alternatives ``a|b``; a number counts whole, whatever groups its digits."""
    plain = re.sub(r"(?<=\d)[,.' \u00a0\u202f](?=\d{3}(?!\d))", "", answer).casefold()
    return any(
        re.search(rf"(?<![A-Za-z\d.,]){re.escape(each.casefold())}(?!\d|[.,]\d)", text) is not None
        if each[0].isdigit()
        else each.casefold() in text
        for each in value.split("|")
        for text in (plain, answer.casefold())
    )
