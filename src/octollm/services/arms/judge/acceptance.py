"""Accepts a step's result by its evidence.

Code is validated again, a query is run again, citations are looked up; a capable model judges what code cannot check
(LLM as a judge).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Awaitable, Callable, Mapping
from itertools import islice
from typing import Any

import jsonschema_rs
import msgspec

from octollm import Citation, Evidence, FileRef, Message, OctoError
from octollm.contracts.operations import (
    AcceptRequest,
    AcceptResult,
    ResultSet,
    RunRequest,
    ValidateRequest,
    format_cell,
    parse_result_set,
)
from octollm.contracts.output_schema import extract_json, find_output_schema
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.judge.validation import Run, parse_python, validate
from octollm.text.lexical import content_words, extract_numbers, extract_numbers_and_words, stems
from octollm.text.passages import numbered_lines

ReadFile = Callable[[str], Awaitable[bytes]]
"""Read a stored file by its digest."""


async def read_text(file: FileRef, read_file: ReadFile) -> str:
    """Return a file's text: what stands in place, else what is stored. Bytes that are no UTF-8 are marked."""
    if file.text is not None:
        return file.text
    if file.digest is None:
        return ""
    return (await read_file(file.digest)).decode("utf-8-sig", errors="replace")


MAX_SHOWN_CHARS = 6000
MAX_OPINION_TOKENS = 200
_OPINION_PROMPT = (
    "You judge whether a result does what was asked and meets every criterion. Be strict about what is missing or "
    "wrong, not about style. Reply with JSON; give a short reason when it does not."
)
_OPINION_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 300},
        "accepted": {"type": "boolean"},
    },
    "required": ["reason", "accepted"],
    "additionalProperties": False,
}


class _Opinion(msgspec.Struct, frozen=True):
    accepted: bool
    reason: str = ""


async def ask_opinion(request: AcceptRequest, ask: PromptFunction) -> AcceptResult:
    """Return what the model thinks of the result. Raises ``OctoError`` (``model_output_invalid``) if it is not JSON."""
    answer = await ask(_opinion_messages(request), max_tokens=MAX_OPINION_TOKENS, schema=_OPINION_SCHEMA)
    try:
        said = msgspec.json.decode(answer.encode(), type=_Opinion)
    except msgspec.DecodeError as exc:
        raise OctoError("The model's verdict could not be read.", code="model_output_invalid") from exc
    reasons = () if said.accepted else (said.reason.strip() or "The result does not do what was asked.",)
    return AcceptResult(accepted=said.accepted, reasons=reasons, score=1.0 if said.accepted else 0.0)


def _opinion_messages(request: AcceptRequest) -> list[Message]:
    criteria = "".join(f"\n- {criterion}" for criterion in request.criteria[:10])
    listed = f"\n\nCriteria:{criteria}" if criteria else ""
    output = request.result.output[:MAX_SHOWN_CHARS]
    # The result may hold text that speaks to the judge; the marks say where it begins and ends.
    return [
        Message.system(_OPINION_PROMPT),
        Message.user(f"Asked:\n{request.goal}{listed}\n\n<result>\n{output}\n</result>"),
    ]


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


MAX_COMPARED_ROWS = 50
"""Rows of the query's output that the answer has to show."""
_TABLE_REFERENCE = re.compile(r"\b(?:from|join)\b", re.IGNORECASE)


async def check_data(request: AcceptRequest, evidence: Evidence, run: Run) -> tuple[list[str], int]:
    """Return the reasons against an answer from data, and how many checks were done."""
    query, output = evidence.query, request.result.output
    if not query:
        return ["The answer names no query."], 1
    reasons: list[str] = []
    if not _TABLE_REFERENCE.search(query):
        reasons.append("The query reads no table.")
    if _collapse_query_whitespace(query) not in _collapse_query_whitespace(output):
        reasons.append("The answer does not show its query.")
    ran = await run(RunRequest(language="sql", command=(query,), files=request.files))
    if ran.exit_code != 0:
        reasons.append(f"The query fails when it is run again: {(ran.stderr.strip() or ran.reason)[:300]}")
        return reasons, 3
    table = parse_result_set(ran.stdout)
    if not table.rows and not output.lower().startswith("no rows"):
        reasons.append("The query gives no rows, but the answer does not say so.")
    reasons.extend(_find_differences(table, evidence, output))
    return reasons, 4


def _find_differences(table: ResultSet, evidence: Evidence, output: str) -> list[str]:
    differences: list[str] = []
    if evidence.rows is not None and evidence.rows != table.row_count:
        differences.append(f"The answer counts {evidence.rows} rows, the query gives {table.row_count}.")
    lines = output.split("\n")
    for row in table.rows[:MAX_COMPARED_ROWS]:
        cells = [format_cell(cell) for cell in row]
        if len(table.rows) == 1:
            missing = [cell for cell in cells if not any(line.endswith(f": {cell}") for line in lines)]
        else:
            missing = [] if " | ".join(cells) in lines else cells
        if missing:
            differences.append(f"The answer does not show what the query gives: {', '.join(missing)[:200]}.")
            break
    return differences


def _collapse_query_whitespace(text: str) -> str:
    return " ".join(text.split())


MIN_ASSERTIONS = 2


async def check_code(texts: dict[str, str], run: Run) -> tuple[list[str], int]:
    """Return the reasons against the Python files ``texts`` (name → text), and how many checks were done."""
    tests = [name for name in texts if name.startswith("test")]
    modules = [name for name in texts if name not in tests]
    if not modules:
        return ["There is no Python file with code among the artifacts."], 1
    if not tests:
        return ["There is no test file among the artifacts."], 1
    reasons: list[str] = []
    checks = 0
    for name in modules:
        own = next((test for test in tests if name.removesuffix(".py") in test), tests[0])
        fault = find_test_weakness(texts[own], name.removesuffix(".py"))
        checks += 2
        if fault:
            reasons.append(fault)
        verdict = await validate(
            ValidateRequest(code=texts[name], filename=name, tests=texts[own], tests_filename=own), run
        )
        reasons.extend(verdict.reasons)
    return reasons, checks


def find_test_weakness(tests: str, module: str) -> str:
    """Say why tests prove nothing of ``module``; empty when they import it and compare several of its results."""
    tree, fault = parse_python(tests, "the tests")
    if tree is None:
        return fault
    names = _imported_names(tree, module)
    if not names:
        return f"The tests do not import {module}."
    made = _derived_names(tree, names)
    held = {ast.unparse(node) for node in ast.walk(tree) if _is_assertion(node) and _reads_any(node, names | made)}
    if len(held) < MIN_ASSERTIONS:
        return f"The tests assert less than {MIN_ASSERTIONS} things of {module}."
    if any(isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names for n in ast.walk(tree)):
        return f"The tests define what they should import from {module}."
    return ""


def _imported_names(tree: ast.Module, module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.asname or alias.name for alias in node.names if alias.name == module)
    return names


def _derived_names(tree: ast.Module, names: set[str]) -> set[str]:
    """Return the variables and attributes that hold something made with ``names``, by what is read of them."""
    made: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _reads_any(node.value, names | made):
            made.update(ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.withitem) and node.optional_vars and _reads_any(node.context_expr, names):
            made.add(ast.unparse(node.optional_vars))
    return made


def _is_assertion(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.With):
        return any("assertRaises" in ast.unparse(item.context_expr) for item in node.items)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert")


def _reads_any(node: ast.AST, names: set[str]) -> bool:
    return any(
        (isinstance(n, ast.Name) and n.id in names) or (isinstance(n, ast.Attribute) and ast.unparse(n) in names)
        for n in ast.walk(node)
    )


MAX_OUTPUT_FAULTS = 5


def find_output_faults(output: str, schema: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why an output is not valid against a JSON Schema, each with a JSON Pointer; nothing when it is valid."""
    try:
        document = msgspec.json.decode(extract_json(output))
    except (msgspec.DecodeError, RecursionError) as error:
        return (f"The output is no JSON document: {error}",)
    try:
        # The schema is the client's: patterns run in linear time, and references to other hosts are not followed.
        validator = jsonschema_rs.validator_for(
            dict(schema), pattern_options=jsonschema_rs.RegexOptions(), offline=True
        )
    except (jsonschema_rs.ValidationError, ValueError) as error:
        return (f"The JSON Schema of the output is invalid: {str(error)[:200]}",)
    return tuple(
        f"The output does not fit its JSON Schema at {_json_pointer(error.instance_path) or 'the top'}: "
        f"{error.message[:200]}"
        for error in islice(validator.iter_errors(document), MAX_OUTPUT_FAULTS)
    )


def _json_pointer(path: list[str | int]) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


_EMPTY_OUTPUT = re.compile(r"^\W*+(?:none|null|n/?a|todo)?\W*+$", re.IGNORECASE)
"""Possessive quantifiers: backtracking over a long run of brackets would take quadratic time."""
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
    schema = find_output_schema(request.criteria)
    if schema is not None and (faults := find_output_faults(request.result.output, schema)):
        return AcceptResult(accepted=False, reasons=faults, score=0.0)
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
