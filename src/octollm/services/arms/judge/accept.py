"""Is a step's result what was asked? The judge's own look, by what the result stands on."""

from __future__ import annotations

import re

from octollm.contracts.asking import PromptFunction
from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.contracts.task import FileRef
from octollm.services.arms.judge.accept_code import check_code
from octollm.services.arms.judge.accept_data import check_data
from octollm.services.arms.judge.accept_documents import check_documents
from octollm.services.arms.judge.opinion import ask_opinion
from octollm.services.arms.judge.reading import ReadFile, read_text
from octollm.services.arms.judge.testing import Run

_EMPTY_OUTPUT = re.compile(r"^\W*(?:none|null|n/?a|todo)?\W*$", re.IGNORECASE)
_UNCHECKED_SCORE = 0.5
"""The score of a text that nobody could check."""


async def accept(request: AcceptRequest, run: Run, ask: PromptFunction | None, read_file: ReadFile) -> AcceptResult:
    """Judge a result. Code is validated anew, a query is run anew, citations are looked up in their files.

    What can be checked decides. ``ask`` is a model that is able to judge, or ``None``: its opinion is asked of plain
    text, and of criteria once the checks have passed. ``score`` is the share of checks that passed. Raises what
    ``run``, ``ask`` and ``read_file`` raise.
    """
    evidence = request.result.evidence
    if _EMPTY_OUTPUT.match(request.result.output) and not request.result.artifacts:
        return AcceptResult(accepted=False, reasons=("The result is empty.",), score=0.0)
    if evidence is None or evidence.kind == "text":
        return await ask_opinion(request, ask) if ask else AcceptResult(accepted=True, score=_UNCHECKED_SCORE)
    if evidence.kind == "documents":
        reasons, checks = await check_documents(request, evidence, read_file)
    elif evidence.kind == "data":
        reasons, checks = await check_data(request, evidence, run)
    else:
        made = [FileRef(a.name, digest=a.digest) for a in request.result.artifacts if a.name.endswith(".py")]
        reasons, checks = await check_code({file.name: await read_text(file, read_file) for file in made}, run)
    if not reasons and request.criteria and ask:
        return await ask_opinion(request, ask)
    failed = min(len(reasons), checks)
    return AcceptResult(accepted=not reasons, reasons=tuple(reasons), score=round((checks - failed) / checks, 2))
