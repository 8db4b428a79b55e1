"""One answer from documents and tables together: the results of both steps, and a sentence that joins them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from octollm import Check, Citation, Evidence, ExecuteResult, Message, OctoError
from octollm.contracts.operations import Passage
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.fidelity import find_changed_figures
from octollm.services.arms.retriever.answer import Search
from octollm.services.arms.retriever.chunks import DATA_RULE, show_document
from octollm.services.arms.retriever.sentences import clean_sentence
from octollm.services.arms.retriever.support import measure_support
from octollm.text.lexical import stems

MAX_PASSAGES = 20
_MAX_SHOWN = 3000
_ANSWER_TOKENS = 120
MIN_JOINED_SUPPORT = 0.6
"""Share of the joining sentence's words that the two results or the question must have."""
_QUERY = re.compile(r"Query:\n```sql\n(?P<query>.+?)\n```", re.DOTALL)
_NOTE = re.compile(r"^Note: (.+)$", re.MULTILINE)
_REFERENCE = re.compile(r"\s*\[[^\[\]\n]+(?::\d+(?:-\d+)?|, [^\[\]\n]+)\]")
_KEPT_ERRORS = frozenset({"model_output_truncated", "model_output_filtered", "budget_exhausted", "context_too_long"})


@dataclass(frozen=True, slots=True)
class PartialResults:
    """The results of the steps before: the text from documents, and the text from tables with its query."""

    documents: str
    tables: str
    query: str


def split_results(inputs: Mapping[str, str]) -> PartialResults | None:
    """Return the results of a step over documents and of one over tables; ``None`` unless there is one of each."""
    with_query = [text for text in inputs.values() if _QUERY.search(text)]
    others = [text for text in inputs.values() if not _QUERY.search(text)]
    if len(with_query) != 1 or len(others) != 1:
        return None
    match = _QUERY.search(with_query[0])
    return PartialResults(others[0], with_query[0], match["query"] if match else "")


async def combine_results(
    question: str, results: PartialResults, files: Collection[str], ask: PromptFunction, search: Search
) -> ExecuteResult:
    """Return one answer that cites the documents and shows the query over the tables.

    The model words a sentence from both results. It is used only if it adds no number to them. ``files`` are the names
    of the documents. Raises what ``search`` raises, and what ``ask`` raises but for answers that were cut.
    """
    found = not results.documents.lower().startswith("not found")
    notes = tuple(_NOTE.findall(results.documents))
    statement = _NOTE.sub("", _REFERENCE.sub("", results.documents)).strip()
    passages = list(await search(f"{question}\n{statement}", MAX_PASSAGES)) if found else list[Passage]()
    citations = _cite(question, statement, [each for each in passages if each.source in files])
    sentence = await _join(question, results, ask)
    parts = [sentence]
    if citations:
        references = "\n".join(dict.fromkeys(each.reference for each in citations))
        parts.append(f"{statement}\n{references}")
    elif not found:
        parts.append(results.documents)
    # Before the tables: the answer's end is the query.
    parts += [f"Note: {note}" for note in notes]
    parts.append(results.tables)
    checks = [Check("support", bool(citations), "the lines of the documents" if citations else "no line was found")]
    if sentence:
        checks.append(
            Check("joined", False, "whether the first sentence joins the results rightly", checked_by="nobody")
        )
    return ExecuteResult(
        output="\n\n".join(filter(None, parts)),
        evidence=Evidence(
            kind="documents" if citations else "data",
            citations=citations,
            query=results.query,
            checks=tuple(checks),
            notes=(*notes, *_NOTE.findall(results.tables)),
        ),
    )


def _cite(question: str, statement: str, passages: Sequence[Passage]) -> tuple[Citation, ...]:
    return measure_support(question, statement, passages).citations if passages else ()


async def _join(question: str, results: PartialResults, ask: PromptFunction) -> str:
    """Return the model's sentence, or an empty string if it says what neither result does."""
    shown = "\n".join(
        (
            show_document("documents", results.documents[:_MAX_SHOWN]),
            show_document("tables", results.tables[:_MAX_SHOWN]),
        )
    )
    instruction = f"Answer in one short sentence, with the numbers of these results: {question}"
    try:
        answer = await ask(
            [Message.system(DATA_RULE + "Use both results."), Message.user(f"{shown}\n\n{instruction}")],
            max_tokens=_ANSWER_TOKENS,
            suffices=lambda text: "\n" in text.strip(),
        )
    except OctoError as error:
        if error.code not in _KEPT_ERRORS:
            raise
        return ""
    sentence = clean_sentence(answer.strip().split("\n")[0])
    known = f"{results.documents}\n{results.tables}\n{question}"
    _, added = find_changed_figures(known, sentence)
    own = stems(sentence)
    if added or not own or len(own & stems(known)) < MIN_JOINED_SUPPORT * len(own):
        return ""
    return sentence
