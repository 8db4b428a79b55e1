"""Work on documents without services: a scripted model, budgets that a test sets, and the judge's verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from octollm.contracts.operations import AcceptRequest, AcceptResult, RunRequest, RunResult
from octollm.contracts.task import Artifact, ExecuteResult, FileRef
from octollm.documents.model import FlatDocument
from octollm.errors import OctoError
from octollm.services.arms.judge.acceptance import accept
from octollm.services.arms.retriever.chunks import SourceText, WorkTools, make_source
from octollm.services.arms.retriever.service import choose_work, work_on_documents

Reply = Callable[[str, dict[str, Any] | None], object]
"""What the model says to a prompt and a schema: a text, a value to encode as JSON, or an error to raise."""


class DocumentKit:
    """Runs goals over documents. ``prompts`` are the model's; a model call takes ``seconds`` and ``tokens``."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.artifacts: dict[str, str] = {}
        self.progress: list[str] = []
        self.tokens_left: int | None = None
        self.seconds_left = 600.0
        self.tokens, self.seconds = 0, 0.0
        self.chunk_chars = 2400

    async def run(
        self, goal: str, documents: dict[str, str], reply: Reply, *locations: tuple[int, str]
    ) -> ExecuteResult:
        """Do what a goal asks for with documents, by name."""
        sources = [make_source(FlatDocument(name, "text", text, locations)) for name, text in documents.items()]
        tools = WorkTools(
            self._ask(reply),
            self._progress,
            lambda: self.tokens_left,
            lambda: self.seconds_left,
            self._write,
            chunk_chars=self.chunk_chars,
        )
        work = await choose_work(goal, len(documents), tools.ask)
        return await work_on_documents(goal, work, sources, tools)

    async def judge(
        self, goal: str, documents: dict[str, str], result: ExecuteResult, criteria: Sequence[str] = ()
    ) -> AcceptResult:
        """Return the real judge's verdict on a result, without a model."""

        async def read_text(file: FileRef) -> str:
            return documents[file.name]

        async def run(request: RunRequest) -> RunResult:
            raise AssertionError(f"nothing is to be run: {request}")

        files = tuple(FileRef(name, text=text, kind="text") for name, text in documents.items())
        return await accept(AcceptRequest(goal, result, tuple(criteria), files), run, None, read_text)

    def _ask(self, reply: Reply):
        async def ask(messages, *, schema=None, **_options) -> str:
            self.prompts.append("\n".join(message.content for message in messages))
            self.seconds_left -= self.seconds
            if self.tokens_left is not None:
                if self.tokens_left < self.tokens:
                    raise OctoError("The budget is used up.", code="budget_exhausted")
                self.tokens_left -= self.tokens
            said = reply(messages[-1].content, schema)
            if isinstance(said, OctoError):
                raise said
            return said if isinstance(said, str) else msgspec.json.encode(said).decode()

        return ask

    async def _progress(self, percent: float, message: str) -> None:
        assert 0 <= percent <= 100
        self.progress.append(message)

    async def _write(self, name: str, text: str, media_type: str) -> Artifact:
        self.artifacts[name] = text
        return Artifact(name, "0" * 64, len(text), media_type)


def make_text(text: str, name: str = "a.txt") -> SourceText:
    """Return a text as a document."""
    return make_source(FlatDocument(name, "text", text))
