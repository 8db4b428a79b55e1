"""Accepts or rejects a step's result by its evidence.

The judge validates code again, runs a query again and looks up citations; a capable model judges what rules cannot
check (LLM as a judge).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import jsonschema_rs
import msgspec

from octollm import Check, Evidence, FileRef, Message, OctoError
from octollm.contracts.media_types import kind_of_file
from octollm.contracts.operations import (
    MAX_SHOWN_ASSUMPTIONS,
    AcceptRequest,
    AcceptResult,
    ResultSet,
    RunRequest,
    ValidateRequest,
    format_cell,
    parse_result_set,
)
from octollm.contracts.output_schema import extract_json, find_output_schema
from octollm.errors import map_exceptions
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.judge.criteria import check_text, unchecked
from octollm.services.arms.judge.document_checks import (
    ReadText,
    check_documents,
    collapse_whitespace,
    may_be_shorter,
    strip_citations,
)
from octollm.services.arms.judge.validation import Run, Validate, parse_python, validate

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
    """Return the model's verdict on a result. Raises ``OctoError`` (``model_output_invalid``) if it is not JSON."""
    answer = await ask(_opinion_messages(request), max_tokens=MAX_OPINION_TOKENS, schema=_OPINION_SCHEMA)
    with map_exceptions(
        OctoError("The model's verdict could not be read.", code="model_output_invalid"), msgspec.DecodeError
    ):
        opinion = msgspec.json.decode(answer.encode(), type=_Opinion)
    reasons = () if opinion.accepted else (opinion.reason.strip() or "The result does not do what was asked.",)
    check = Check("opinion", opinion.accepted, opinion.reason.strip(), checked_by="model")
    return AcceptResult(opinion.accepted, reasons, 1.0 if opinion.accepted else 0.0, (check,))


def _opinion_messages(request: AcceptRequest) -> list[Message]:
    criteria = "".join(f"\n- {criterion}" for criterion in request.criteria[:10])
    listed = f"\n\nCriteria:{criteria}" if criteria else ""
    output = request.result.output[:MAX_SHOWN_CHARS]
    # The result may contain instructions to the judge (prompt injection); the tags mark it as data.
    return [
        Message.system(_OPINION_PROMPT),
        Message.user(f"Asked:\n{request.goal}{listed}\n\n<result>\n{output}\n</result>"),
    ]


MAX_COMPARED_ROWS = 50
"""Rows of the query's output that are compared with the answer."""
_SAYS_NO_ROWS = re.compile(r"^(?:no rows|not found: no row)", re.IGNORECASE | re.MULTILINE)
_TABLE_REFERENCE = re.compile(r"\b(?:from|join)\b", re.IGNORECASE)


async def check_data(request: AcceptRequest, evidence: Evidence, run: Run) -> tuple[list[str], int]:
    """Return the reasons against an answer from data, and the number of checks."""
    query, output = evidence.query, request.result.output
    if not query:
        return ["The answer names no query."], 1
    reasons: list[str] = []
    if not _TABLE_REFERENCE.search(query):
        reasons.append("The query reads no table.")
    if collapse_whitespace(query) not in collapse_whitespace(output):
        reasons.append("The answer does not show its query.")
    tables = tuple(file for file in request.files if kind_of_file(file) == "table")
    run_result = await run(RunRequest(language="sql", command=(query,), files=tables))
    if run_result.exit_code != 0:
        reasons.append(
            f"The query fails when it is run again: {(run_result.stderr.strip() or run_result.reason)[:300]}"
        )
        return reasons, 3
    table = parse_result_set(run_result.stdout)
    if not evidence.found:
        if table.rows or not output.lower().startswith("not found"):
            reasons.append(
                "The answer says that nothing was found, but the query gives rows, or its text says otherwise."
            )
        return reasons, 3
    if not table.rows and not _SAYS_NO_ROWS.search(output):
        reasons.append("The query gives no rows, but the answer does not say so.")
    reasons.extend(_find_differences(table, evidence, output))
    reasons.extend(
        f"The answer does not say that this is undecided: {each.text}"
        for each in table.assumptions[:MAX_SHOWN_ASSUMPTIONS]
        if not each.decided and each.text not in output
    )
    return reasons, 5


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


MIN_ASSERTIONS = 2


async def check_code(texts: dict[str, str], validate_code: Validate) -> tuple[list[str], int]:
    """Return the reasons against the Python files ``texts`` (name → text), and the number of checks."""
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
        verdict = await validate_code(
            ValidateRequest(code=texts[name], filename=name, tests=texts[own], tests_filename=own)
        )
        reasons.extend(verdict.reasons)
    return reasons, checks


def find_test_weakness(tests: str, module: str) -> str:
    """Return why tests prove nothing about ``module``, or an empty string.

    Sound tests import the module and assert several different things about its results.
    """
    tree, fault = parse_python(tests, "the tests")
    if tree is None:
        return fault
    names = _imported_names(tree, module)
    if not names:
        return f"The tests do not import {module}."
    derived = _derived_names(tree, names)
    # A set of sources, so that the same assertion repeated counts once.
    assertions = {
        ast.unparse(node) for node in ast.walk(tree) if _is_assertion(node) and _reads_any(node, names | derived)
    }
    if len(assertions) < MIN_ASSERTIONS:
        return f"The tests make less than {MIN_ASSERTIONS} assertions about {module}."
    if any(isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names for n in ast.walk(tree)):
        # Otherwise the tests would test their own copy.
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
    """Return the variables and attributes whose values are computed with ``names``, directly or through another."""
    derived: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _reads_any(node.value, names | derived):
            derived.update(ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.withitem) and node.optional_vars and _reads_any(node.context_expr, names):
            derived.add(ast.unparse(node.optional_vars))
    return derived


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
        # The client wrote the schema. So patterns use the engine with linear run time (no ReDoS), and remote
        # references are not fetched (no SSRF).
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
UNCHECKED_SCORE = 0.5
"""What a check counts that nobody has done."""
WHOLE_RESULT = "whether the result does what was asked"
"""What no rule can check."""


async def accept(
    request: AcceptRequest,
    run: Run,
    ask: PromptFunction | None,
    read_text: ReadText,
    validate_code: Validate | None = None,
) -> AcceptResult:
    """Judge a result by its evidence: validate code again, run a query again, look up citations in their files.

    Of a text, rules check length, language, format and words, as far as the criteria or the goal demand them. These
    checks take precedence over a model's opinion. ``ask`` is a model capable of judging, or ``None``: it judges what
    the rules leave open. ``checks`` also has what nobody checked; of a text, that counts half in ``score``, which is
    otherwise the share of checks that passed. ``validate_code`` replaces the validation by ``run``. Raises what the
    callables raise.
    """
    evidence = request.result.evidence
    if _EMPTY_OUTPUT.match(request.result.output) and not request.result.artifacts:
        return AcceptResult(accepted=False, reasons=("The result is empty.",), score=0.0)
    schema = find_output_schema(request.criteria)
    if schema is not None and (faults := find_output_faults(request.result.output, schema)):
        return AcceptResult(accepted=False, reasons=faults, score=0.0)
    criteria = [criterion for criterion in request.criteria if find_output_schema([criterion]) is None]
    if evidence is None or evidence.kind == "text":
        checks = check_text(request.goal, criteria, request.result.output)
        if schema is not None:
            checks.append(Check("schema", True))
        reasons = [check.detail for check in checks if not check.passed and check.checked_by == "code"]
        return await _conclude(request, reasons, checks, ask)
    open_checks: list[Check] = []
    if evidence.kind == "documents":
        reasons, number, open_checks = await check_documents(request, evidence, read_text)
        if evidence.query:
            more, checked = await check_data(request, evidence, run)
            reasons, number = [*reasons, *more], number + checked
    elif evidence.kind == "data":
        reasons, number = await check_data(request, evidence, run)
    else:
        sources = [FileRef(a.name, digest=a.digest) for a in request.result.artifacts if a.name.endswith(".py")]
        texts = {file.name: await read_text(file) for file in sources}
        reasons, number = await check_code(texts, validate_code or (lambda code: validate(code, run)))
    failed = min(len(reasons), number)
    checks = [Check(evidence.kind, index >= failed) for index in range(number)]
    if evidence.kind == "documents" and evidence.found:
        # What the goal says of length and language is about the text, not about its references.
        shorter = await may_be_shorter(request, evidence, read_text)
        plain = strip_citations(request.result.output, evidence)
        stated = check_text(request.goal, criteria, plain, may_be_shorter=shorter)
        reasons += [check.detail for check in stated if not check.passed and check.checked_by == "code"]
        checks += [*stated, *open_checks]
    else:
        checks += [unchecked(criterion) for criterion in criteria]
    return await _conclude(request, reasons, checks, ask if criteria else None)


async def _conclude(
    request: AcceptRequest, reasons: Sequence[str], checks: Sequence[Check], ask: PromptFunction | None
) -> AcceptResult:
    """Return the verdict of the checks. A model is asked about what they leave open, if they have passed."""
    is_text = request.result.evidence is None or request.result.evidence.kind == "text"
    if not reasons and ask:
        opinion = await ask_opinion(request, ask)
        done = tuple(check for check in checks if check.checked_by != "nobody")
        return msgspec.structs.replace(opinion, checks=(*_merge(done), *opinion.checks))
    every = [*checks, *([unchecked(WHOLE_RESULT)] if is_text else [])]
    counted = every if is_text else [check for check in every if check.checked_by != "nobody"]
    worth = sum(UNCHECKED_SCORE if check.checked_by == "nobody" else check.passed for check in counted)
    return AcceptResult(
        accepted=not reasons,
        reasons=tuple(reasons),
        score=round(worth / len(counted), 2),
        checks=tuple(_merge(every)),
    )


def _merge(checks: Sequence[Check]) -> list[Check]:
    """Return each check once: several of one kind that have the same outcome are one."""
    return list(dict.fromkeys(checks))
