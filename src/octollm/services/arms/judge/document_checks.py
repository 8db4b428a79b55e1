"""Checks of results over documents: citations against the files, each statement against the lines that it cites.

Whole texts, such as translations, are compared with their sources by numbers, addresses and language.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from octollm import Check, Citation, Evidence, FileRef
from octollm.contracts.media_types import kind_of_file
from octollm.contracts.operations import AcceptRequest
from octollm.services.arms.document_goals import find_document_work, find_result_language
from octollm.services.arms.fidelity import (
    contradicts,
    find_changed_figures,
    find_figures,
    find_identifiers,
    find_missing,
    find_unsupported_figures,
)
from octollm.text.language import detect_language, find_requested_language, is_same_language
from octollm.text.lexical import content_words, stems, tokenize
from octollm.text.limits import COUNTERS, count_sentences, find_limits
from octollm.text.passages import numbered_lines
from octollm.text.question_terms import TermIndex, recognize_language

ReadText = Callable[[FileRef], Awaitable[str]]
"""Return the text of a file, whatever its format."""

MIN_SUPPORT = 0.5
"""Share of the answer's own words that the cited lines must contain."""
MAX_CITED_LINES = 12
MAX_FAULTS = 5
"""Faults of one kind that are reported."""
_DENIALS = ("not found", "not stated", "not mentioned")
_NOTE = "Note: "


async def check_documents(
    request: AcceptRequest, evidence: Evidence, read_text: ReadText
) -> tuple[list[str], int, list[Check]]:
    """Return the reasons against a result over documents, the number of checks, and what nobody could check.

    "Not found" is a valid result, provided that its text says so and it cites nothing.
    """
    if not evidence.found:
        if evidence.citations:
            return ["The answer says that nothing was found, and cites something."], 1, []
        is_denial = request.result.output.lower().startswith(_DENIALS)
        return ([] if is_denial else ["Nothing was found, but the answer does not say so."]), 1, []
    texts = _CachedTexts(request.files, read_text)
    if evidence.work in ("translation", "rewrite"):
        return await _check_whole_text(request, evidence, texts)
    if not evidence.citations:
        return ["The answer cites nothing."], 1, []
    reasons = [fault for each in evidence.citations if (fault := await _find_citation_fault(each, texts))]
    if evidence.work == "answer":
        return [*reasons[:MAX_FAULTS], *_find_answer_faults(request, evidence)], len(evidence.citations) + 2, []
    statements = split_statements(request.result.output, evidence)
    faults: list[str] = []
    translated = 0
    for statement in statements:
        fault, is_translated = await _find_statement_fault(statement, request, evidence, texts)
        faults += [fault] if fault else []
        translated += is_translated
    if not statements:
        faults.append("The result states nothing.")
    open_checks = [
        Check("unchecked", False, "whether the sentences mean what the cited lines say in another language",
              checked_by="nobody")
    ] if translated else []  # fmt: skip
    return [*reasons[:MAX_FAULTS], *faults[:MAX_FAULTS]], len(evidence.citations) + len(statements), open_checks


class _CachedTexts:
    """The texts of a step's files, each read once: a file may be cited many times."""

    def __init__(self, files: Sequence[FileRef], read_text: ReadText) -> None:
        self.files = {file.name: file for file in files}
        self._read_text = read_text
        self._texts: dict[str, str] = {}

    async def get(self, name: str) -> str:
        """Return the text of a file of the step."""
        if name not in self._texts:
            self._texts[name] = await self._read_text(self.files[name])
        return self._texts[name]

    async def documents(self) -> dict[str, str]:
        """Return the texts of all files that are documents."""
        return {name: await self.get(name) for name, file in self.files.items() if kind_of_file(file) == "text"}


async def _find_citation_fault(citation: Citation, texts: _CachedTexts) -> str:
    """Return the fault of a citation, or an empty string."""
    where = f"{citation.file}:{citation.lines}"
    if citation.file not in texts.files:
        return f"{where} is cited, but the step was not given that file."
    lines = numbered_lines(await texts.get(citation.file))
    if not 1 <= citation.line_start <= citation.line_end <= len(lines):
        return f"{where} is cited, but the file has {len(lines)} lines."
    if citation.line_end - citation.line_start >= MAX_CITED_LINES:
        return f"{where} is too long for a citation."
    cited_text = "\n".join(lines[citation.line_start - 1 : citation.line_end])
    if not citation.text.strip() or collapse_whitespace(citation.text) not in collapse_whitespace(cited_text):
        return f"{where} does not contain the cited text."
    return ""


def collapse_whitespace(text: str) -> str:
    """Return a text with single spaces between its words."""
    return " ".join(text.split())


def _find_answer_faults(request: AcceptRequest, evidence: Evidence) -> list[str]:
    """Return why the cited lines together do not support an answer."""
    answer = strip_citations(request.result.output, evidence)
    cited = "\n".join(citation.text for citation in evidence.citations)
    if evidence.query is not None:
        # The rows of the query are compared by running it again, and support the answer beside the lines.
        answer, rows = split_rows(answer)
        cited = f"{cited}\n{rows}"
    reasons: list[str] = []
    wanted, theirs = find_requested_language(request.goal), detect_language(cited)
    if wanted is not None and theirs and not is_same_language(wanted[0], theirs):
        _, added = find_changed_figures(f"{cited}\n{request.goal}", answer)
        return [f"The answer has {', '.join(added)}, the cited lines do not."] if added else []
    own = (stems(answer) - stems(request.goal)) or stems(answer)
    # The stems are English: words in another inflection of their own language are not missing.
    terms = TermIndex(cited, (recognize_language(cited),))
    lacking = [word for word in content_words(answer) if stems(word) <= own - stems(cited) and not terms.has_word(word)]
    if own and len({stem for word in lacking for stem in stems(word)}) > (1 - MIN_SUPPORT) * len(own):
        missing = lacking[:5]
        reasons.append(f"The cited lines do not support the answer: they lack {', '.join(missing)}.")
    if unsupported := find_unsupported_figures(request.goal, cited, answer):
        reasons.append(f"The answer has {', '.join(unsupported)}, the cited lines do not.")
    return reasons


def split_rows(answer: str) -> tuple[str, str]:
    """Return an answer from documents and tables without what the query gives, and that: the last parts of it."""
    head, mark, query = answer.partition("Query:\n```sql")
    parts = head.rstrip().split("\n\n")
    while len(parts) > 1 and parts[-1].startswith(("Assumptions:", "Not decided by the file", _NOTE)):
        query = parts.pop() + query
    return "\n\n".join(parts[:-1]), f"{parts[-1]}\n{mark}{query}"


def strip_citations(output: str, evidence: Evidence) -> str:
    """Return the text of a result without its references and notes: what its limits of length are about."""
    for citation in evidence.citations:
        output = output.replace(f" {citation.reference}", "").replace(citation.reference, " ")
    lines = [line for line in output.split("\n") if not _is_note(line, evidence)]
    return "\n".join(lines).strip()


def _is_note(line: str, evidence: Evidence) -> bool:
    return line.startswith(_NOTE) and line.removeprefix(_NOTE) in evidence.notes


@dataclass(frozen=True, slots=True)
class Statement:
    """A part of a result up to its references, and the lines that these name."""

    text: str
    citations: tuple[Citation, ...]


def split_statements(output: str, evidence: Evidence) -> list[Statement]:
    """Return the statements of a result: each sentence, item or cell with the references behind it.

    What has no reference behind it is a statement without citations; headings, rules and names of fields are none.
    """
    by_reference: dict[str, list[Citation]] = {}
    for citation in evidence.citations:
        by_reference.setdefault(citation.reference, []).append(citation)
    references = "|".join(re.escape(each) for each in sorted(by_reference, key=len, reverse=True))
    group = re.compile(rf"((?:\s*(?:{references}))+)")
    single = re.compile(references)
    found: list[Statement] = []
    is_first_row = True
    for line in output.split("\n"):
        if not line.strip() or _is_note(line, evidence) or line.startswith("## ") or set(line) <= set("|-: "):
            continue
        cells = re.split(r"(?<!\\)\|", line.strip("|")) if line.startswith("|") else [line]
        if line.startswith("|") and is_first_row:
            is_first_row = False
            continue
        for cell in cells:
            parts = group.split(cell)
            for text, named in zip(parts[::2], [*parts[1::2], ""], strict=True):
                cited = [citation for name in single.findall(named) for citation in by_reference[name]]
                plain = text.replace("\\|", "|").strip(" -*\t")
                is_label = not cited and (plain.endswith(":") or (line.startswith("|") and cell is cells[0]))
                if (cited or re.search(r"\w", plain)) and not is_label:
                    found.append(Statement(plain, tuple(cited)))
    return found


async def _find_statement_fault(
    statement: Statement, request: AcceptRequest, evidence: Evidence, texts: _CachedTexts
) -> tuple[str, bool]:
    """Return why the cited lines do not support a statement, and whether it is in another language than these."""
    short = statement.text[:80]
    if not statement.citations:
        return f"“{short}” cites nothing.", False
    cited = "\n".join(citation.text for citation in statement.citations)
    if evidence.work == "table":
        value = statement.text.split(": ", 1)[-1]
        found = any(
            collapse_whitespace(each).casefold() in collapse_whitespace(cited).casefold()
            for each in (statement.text, value)
        )
        return ("" if found else f"“{short}” does not stand in the lines that it cites."), False
    names = " ".join(texts.files)
    _, added = find_changed_figures(f"{cited}\n{request.goal}\n{names}", statement.text)
    if added:
        return f"“{short}” has {', '.join(added[:5])}, the lines that it cites do not.", False
    if lost := find_missing(find_identifiers(statement.text), f"{cited}\n{names}"):
        return f"“{short}” has {', '.join(lost[:3])}, the lines that it cites do not.", False
    ours, theirs = detect_language(statement.text), detect_language(cited)
    if ours and theirs and not is_same_language(ours, theirs):
        return "", True
    own = stems(statement.text) - stems(names)
    coverage = len(own & stems(cited)) / len(own) if own else 1.0
    if evidence.work == "comparison" and (not own or coverage < MIN_SUPPORT):
        same = await _say_the_same(statement, texts)
        return ("" if same else f"The lines that “{short}” cites do not support it."), False
    whole = strip_citations(request.result.output, evidence)
    if (
        coverage < MIN_SUPPORT
        and not ours
        and theirs
        and not is_same_language(detect_language(whole) or theirs, theirs)
    ):
        return "", True
    if coverage < MIN_SUPPORT:
        return f"The lines that “{short}” cites do not support it.", False
    if evidence.work == "summary" and contradicts(statement.text, cited):
        return f"“{short}” says the opposite of the lines that it cites.", False
    return "", False


async def _say_the_same(statement: Statement, texts: _CachedTexts) -> bool:
    """Return whether the documents that a statement cites have the same words, in whatever order."""
    names = {citation.file for citation in statement.citations}
    counted = [Counter(tokenize(await texts.get(name))) for name in names]
    return len(names) > 1 and all(each == counted[0] for each in counted)


async def _check_whole_text(
    request: AcceptRequest, evidence: Evidence, texts: _CachedTexts
) -> tuple[list[str], int, list[Check]]:
    """Return the reasons against a translation or a rewritten text.

    Only a goal that asks for it may be met by a text that cites nothing.
    """
    sources = await texts.documents()
    asked = find_document_work(request.goal, documents=len(sources))
    if asked not in (None, evidence.work):
        return [f"The goal does not ask for a {evidence.work}."], 1, []
    output = strip_citations(request.result.output, evidence)
    source = "\n".join(sources.values())
    missing, added = find_changed_figures(source, output)
    reasons: list[str] = []
    # A text of several documents has their names as headings.
    added = sorted(set(added) - find_figures("\n".join(sources)))
    if added:
        reasons.append(f"The text has {', '.join(added[:5])}, its source does not.")
    is_part = any(note.startswith("covers ") or "the artifact has all" in note for note in evidence.notes)
    if missing and not is_part:
        reasons.append(f"The text lacks {', '.join(missing[:5])} of its source.")
    lost = find_missing(find_identifiers(source), output)
    if lost and not is_part:
        reasons.append(f"The text lacks {', '.join(lost[:3])} of its source.")
    if strange := find_missing(find_identifiers(output), f"{source}\n{' '.join(sources)}"):
        reasons.append(f"The text has {', '.join(strange[:3])}, its source does not.")
    wanted = find_result_language(request.goal) if evidence.work == "translation" else detect_language(source)
    found = detect_language(output)
    if wanted and found and not is_same_language(wanted, found):
        reasons.append(f"The text is in {found}, and not in {wanted}.")
    return reasons, 4, []


async def may_be_shorter(request: AcceptRequest, evidence: Evidence, read_text: ReadText) -> bool:
    """Return whether a result may have less than the goal asks for, because its documents have no more.

    A list and a comparison end with the last item. A summary of three sentences needs a document of as many.
    """
    if evidence.work != "summary":
        return evidence.work in ("comparison", "list", "table")
    texts = await _CachedTexts(request.files, read_text).documents()
    source = "\n".join(texts.values())
    return any(
        limit.low > (COUNTERS[limit.unit](source) if limit.unit in ("word", "character") else count_sentences(source))
        for limit in find_limits(request.goal)
    )
