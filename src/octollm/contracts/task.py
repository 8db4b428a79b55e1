"""Messages between client, orchestrator and arms: tasks, plans, budgets and results."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octollm.contracts.approvals import ApprovalPolicy

MAX_JSON_INTEGER = 2**53 - 1
"""The largest integer that every JSON reader represents exactly (RFC 8259 section 6)."""
Count = Annotated[int, Meta(ge=0, le=MAX_JSON_INTEGER)]

MAX_GOAL = 32_000
"""Characters of a goal."""
MAX_FILES = 32
"""Files of a task."""
MAX_FILE_BYTES = 20 * 1024 * 1024
"""Bytes of one file."""

TaskStatus = Literal["accepted", "planning", "running", "waiting", "paused", "completed", "failed", "cancelled"]
StepStatus = Literal["pending", "running", "completed", "skipped", "failed", "cancelled"]
EvidenceKind = Literal["text", "code", "documents", "data"]
FileKind = Literal["table", "text", "binary"]
ParentEnd = Literal["cancel", "continue"]
"""What happens to a sub-task that is open when the task that it belongs to ends."""
DocumentWork = Literal["answer", "summary", "comparison", "table", "list", "translation", "rewrite"]
"""What is done with documents: a question answered, or a text of the named kind made."""


class FileRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file: stored content by its SHA-256 ``digest`` (lower-case hex), or a short ``text`` in place."""

    name: str
    digest: str | None = None
    text: str | None = None
    kind: FileKind | None = None
    """What the file is by its content. The orchestrator sets it; what a client sends is ignored."""
    notes: tuple[str, ...] = ()
    """What was assumed when the file was read, for example its encoding. The orchestrator sets it as well."""


class Artifact(msgspec.Struct, frozen=True):
    """A file that an arm made; ``size`` in bytes, ``digest`` SHA-256 in lower-case hex."""

    name: str
    digest: str
    size: int
    media_type: str


class Budget(msgspec.Struct, frozen=True, omit_defaults=True):
    """The limits of a task. ``None`` means the installation's default.

    ``max_tokens`` counts prompt and completion tokens, ``max_cost_usd`` US dollars, ``max_time_seconds`` wall time.
    """

    max_tokens: int | None = None
    max_cost_usd: float | None = None
    max_time_seconds: float | None = None
    max_retries: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """What was used of a budget; tokens as the model's tokenizer counts them."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    cost_usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost_usd + other.cost_usd,
        )

    @property
    def total_tokens(self) -> int:
        """Return the sum of prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens


class TaskContext(msgspec.Struct, frozen=True, omit_defaults=True):
    """The material of a task or step besides its goal.

    ``inputs`` are the outputs of the steps that it depends on, by step id; ``reasons`` are the judge's reasons
    against the previous attempt; ``text`` is free notes; ``instructions`` are what a person added while the task ran,
    oldest first.
    """

    files: tuple[FileRef, ...] = ()
    text: str = ""
    inputs: dict[str, str] = {}
    reasons: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()


class Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a client submits and what an arm is given. At an arm ``task_id`` is opaque: authority is the token's.

    ``parent_task_id`` makes it a sub-task of that task: it shares its budget, deadline, authority and trace.
    """

    goal: str
    task_id: str | None = None
    context: TaskContext = TaskContext()
    constraints: tuple[str, ...] = ()
    acceptance_criteria: tuple[str, ...] = ()
    budget: Budget = Budget()
    priority: int = 0
    parent_task_id: str | None = None
    assigned_arm: str | None = None
    deadline: str | None = None
    approval: ApprovalPolicy = ApprovalPolicy()
    on_parent_end: ParentEnd = "cancel"


class Citation(msgspec.Struct, frozen=True, omit_defaults=True):
    """A passage that supports an answer: 1-based lines of the text of ``file``, both included.

    ``location`` is where they stand in a file that is no text itself, for example ``page 3``.
    """

    file: str
    line_start: int
    line_end: int
    text: str
    location: str = ""

    @property
    def lines(self) -> str:
        """The lines as text: ``3``, or ``3-4``."""
        return f"{self.line_start}" if self.line_start == self.line_end else f"{self.line_start}-{self.line_end}"

    @property
    def reference(self) -> str:
        """The citation as an answer shows it: ``[notes.txt:3]``, ``[notes.txt:3-4]`` or ``[offer.pdf, page 3]``."""
        return f"[{self.file}, {self.location}]" if self.location else f"[{self.file}:{self.lines}]"


class Check(msgspec.Struct, frozen=True):
    """The result of one check, such as ``syntax``, ``lint`` or ``tests``.

    ``checked_by`` says what a check is worth: ``code`` decides by a rule, ``model`` gives an opinion, and ``nobody``
    has checked what ``detail`` says.
    """

    name: str
    passed: bool
    detail: str = ""
    checked_by: Literal["code", "model", "nobody"] = "code"


class Assumption(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a table was read where its file leaves a choice. ``column`` is empty for the whole table.

    ``decided`` is false when nothing in the file settles the choice, so that the answer may be wrong.
    """

    text: str
    table: str = ""
    column: str = ""
    decided: bool = True


class Evidence(msgspec.Struct, frozen=True, omit_defaults=True):
    """What supports a result, for the judge and for the reader."""

    kind: EvidenceKind
    citations: tuple[Citation, ...] = ()
    query: str | None = None
    columns: tuple[str, ...] = ()
    rows: int | None = None
    assumptions: tuple[Assumption, ...] = ()
    """Those of the tables and columns that the query reads."""
    checks: tuple[Check, ...] = ()
    found: bool = True
    """Whether what the goal asks for is in the files. A result without it is complete, too: it says so."""
    work: DocumentWork = "answer"
    """What was done with the documents of a result of the kind ``documents``."""
    notes: tuple[str, ...] = ()
    """What was assumed when the files of the step were read, and what part of them the result does not cover."""


class ExecuteResult(msgspec.Struct, frozen=True):
    """The response of an arm's ``POST /execute``."""

    output: str
    artifacts: tuple[Artifact, ...] = ()
    usage: Usage = Usage()
    evidence: Evidence | None = None


INLINE_ARTIFACTS_HEADER = "X-Inline-Artifacts"
"""Of a call of ``execute``: how many bytes of artifacts the caller takes in the response, and stores itself."""


class StepResult(ExecuteResult, frozen=True, omit_defaults=True):
    """The response of ``POST /execute`` to a caller that takes artifacts in it, with their texts by digest."""

    texts: dict[str, str] = {}


class PlanStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """One node of a plan: an arm's ``execute`` with a goal of its own."""

    id: str
    title: str
    arm: str
    goal: str
    depends_on: tuple[str, ...] = ()
    acceptance_criteria: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Names of the task's files that this step receives."""
    approval: str = ""
    """Why a person has to approve the step before it starts; empty if the planner sees no need."""


class Plan(msgspec.Struct, frozen=True):
    """A directed acyclic graph of steps."""

    steps: tuple[PlanStep, ...]
    usage: Usage = Usage()


class ArmInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the planner knows of an arm. ``accepts`` are media types, or words such as ``files:tabular``."""

    name: str
    description: str
    accepts: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    approval: str = ""
    """Why a person has to approve each step of the arm; empty if its author sees no need."""


class PlanRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of ``planner POST /plan``."""

    goal: str
    context: TaskContext = TaskContext()
    arms: tuple[ArmInfo, ...] = ()
    acceptance_criteria: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why an earlier plan failed, when replanning."""
