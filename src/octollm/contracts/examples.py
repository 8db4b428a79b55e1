"""A body for each operation of the built-in services, as their descriptions show it."""

from __future__ import annotations

import hashlib

from octollm.contracts.api import KeyRequest, TokenRequest
from octollm.contracts.joining import EnrolmentTokenRequest
from octollm.contracts.operations import (
    AcceptRequest,
    DocumentIn,
    RunRequest,
    SearchRequest,
    ValidateRequest,
)
from octollm.contracts.task import ArmInfo, Budget, ExecuteResult, FileRef, PlanRequest, TaskContext, TaskContract

_EXAMPLE_CODE = "def add(a, b):\n    return a + b\n"
_EXAMPLE_NOTES = "The office closes at six.\nIt opens at nine.\n"

_EXAMPLES = (
    TaskContract(
        "Write a Python function that adds two numbers, with tests",
        acceptance_criteria=("The tests pass.",),
        budget=Budget(max_tokens=20_000, max_time_seconds=300.0),
    ),
    PlanRequest(
        "When does the office close?",
        context=TaskContext(files=(FileRef("notes.txt", text=_EXAMPLE_NOTES),)),
        arms=(ArmInfo("retriever", "Answers questions from the task's files.", ("files:text",)),),
    ),
    RunRequest("python", ("main.py",), (FileRef("main.py", text="print(1 + 1)\n"),)),
    ValidateRequest(_EXAMPLE_CODE, tests="from solution import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"),
    AcceptRequest("When does the office close?", ExecuteResult("At six."), ("The answer names a time.",)),
    SearchRequest("When does the office close?"),
    DocumentIn("notes.txt", _EXAMPLE_NOTES, hashlib.sha256(_EXAMPLE_NOTES.encode()).hexdigest()),
    KeyRequest("laptop", "user"),
    TokenRequest("judge:validate", "judge"),
    EnrolmentTokenRequest("translator", ("models:chat",)),
)

REQUEST_EXAMPLES: dict[object, object] = {type(example): example for example in _EXAMPLES}
"""By the type of the body."""
