"""Checking an answer from documents: its citations stand in the files, and carry what it says."""

from __future__ import annotations

from octollm.contracts.operations import AcceptRequest
from octollm.contracts.passages import numbered_lines
from octollm.contracts.task import Citation, Evidence
from octollm.contracts.words import content_words, extract_numbers, extract_numbers_and_words, stems
from octollm.services.arms.judge.reading import ReadFile, read_text

MIN_SUPPORT = 0.5
"""Share of the answer's own words that the cited lines must hold."""
MAX_CITED_LINES = 12
_DENIALS = ("not found", "not stated", "not mentioned")


async def check_documents(request: AcceptRequest, evidence: Evidence, read_file: ReadFile) -> tuple[list[str], int]:
    """Return the reasons against an answer from documents, and how many checks were done.

    That nothing was found is an honest answer, unless the words of the question stand together in one line.
    """
    output = request.result.output
    if not evidence.found:
        if evidence.citations:
            return ["The answer says that nothing was found, and cites something."], 1
        said = output.lower().startswith(_DENIALS)
        return ([] if said else ["Nothing was found, but the answer does not say so."]), 1
    if not evidence.citations:
        return ["The answer cites nothing."], 1
    reasons: list[str] = []
    for citation in evidence.citations:
        fault = await _find_citation_fault(citation, request, read_file)
        if fault:
            reasons.append(fault)
    answer = _strip_references(output, evidence.citations)
    cited = "\n".join(citation.text for citation in evidence.citations)
    own = (stems(answer) - stems(request.goal)) or stems(answer)
    carried = len(own & stems(cited)) / len(own) if own else 0.0
    if own and carried < MIN_SUPPORT:
        missing = [word for word in content_words(answer) if stems(word) <= own - stems(cited)][:5]
        reasons.append(f"The cited lines do not carry the answer: they lack {', '.join(missing)}.")
    strange = sorted(extract_numbers(answer) - extract_numbers_and_words(cited) - extract_numbers(request.goal))
    if strange:
        reasons.append(f"The answer has {', '.join(strange)}, the cited lines do not.")
    return reasons, len(evidence.citations) + 2


async def _find_citation_fault(citation: Citation, request: AcceptRequest, read_file: ReadFile) -> str:
    """Say what is wrong with a citation, or return the empty string."""
    where = f"{citation.file}:{citation.line_start}-{citation.line_end}"
    file = next((file for file in request.files if file.name == citation.file), None)
    if file is None:
        return f"{where} is cited, but the step was not given that file."
    lines = numbered_lines(await read_text(file, read_file))
    if not 1 <= citation.line_start <= citation.line_end <= len(lines):
        return f"{where} is cited, but the file has {len(lines)} lines."
    if citation.line_end - citation.line_start >= MAX_CITED_LINES:
        return f"{where} is too long for a citation."
    there = "\n".join(lines[citation.line_start - 1 : citation.line_end])
    if not citation.text.strip() or _collapse_whitespace(citation.text) not in _collapse_whitespace(there):
        return f"{where} does not read as cited."
    return ""


def _strip_references(output: str, citations: tuple[Citation, ...]) -> str:
    for citation in citations:
        output = output.replace(f"[{citation.file}:{citation.line_start}-{citation.line_end}]", " ")
    return output


def _collapse_whitespace(text: str) -> str:
    return " ".join(text.split())
