"""The parts that every strategy for writing code shares: prompts, module extraction, validation, the solution."""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from octollm import Check, Message
from octollm.contracts.operations import ValidateRequest, ValidateResult
from octollm.services.arms.coder.examples import Example, render_tests
from octollm.services.arms.coder.python_source import add_imports, extract_code, keep_definitions

_CODE_PROMPT = (
    "You write correct Python 3 with the standard library only. Reply with one code block that has only what is asked "
    "for, with type hints and a short docstring: no tests, no examples, no explanation."
)
_EXAMPLES_PROMPT = (
    "You write test cases for Python functions that you cannot see. Reply with six lines, each one assert, such as: "
    "assert f(2) == 4. Use short inputs whose result follows surely from the task: usual ones first, then edge cases. "
    "No comments, no code block."
)
_TESTS_PROMPT = (
    "You write unittest test cases for Python classes that you cannot see. Reply with one code block: a class with "
    "three to five short test methods that use only what the task says. Each checks results with assertEqual."
)
FUNCTION_INSTRUCTION = "Put the work into a function that returns its result."
"""Added to a goal whose first answer defines nothing that could be tested."""
_NAME_AFTER_CALLED = re.compile(r"\b(?:called|named|name it|call it)\s+[`'\"]?([A-Za-z_]\w*)")
_NAME_BEFORE_PAREN = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\(")
_NAME_AFTER_KEYWORD = re.compile(r"\b(?:function|method|class|def)\s+[`'\"]?([A-Za-z_]\w*)")
_LANGUAGES = re.compile(
    r"\b(?:in|a|an|using|with)\s+(JavaScript|TypeScript|Java|Kotlin|Rust|Go|Golang|Ruby|PHP|Swift|Scala|Haskell|Perl|Lua|"
    r"Elixir|Erlang|Clojure|Bash|PowerShell|C|C\+\+|C#)(?![\w+#])",
)
_TEST_REQUEST = re.compile(
    r"[,;]?\s+(?:and|with|plus|including)\s+(?:(?:some|its|their|a few|good)\s+)?(?:unit\s*)?tests\b"
    r"(?:\s+for\s+(?:it|them))?",
    re.IGNORECASE,
)
MAX_FILE_CHARS = 4000


def find_name_in_goal(goal: str) -> str | None:
    """Return the name that a goal requires for the definition: ``name(…)``, "called name", "function some_name"."""
    for pattern in (_NAME_AFTER_CALLED, _NAME_BEFORE_PAREN, _NAME_AFTER_KEYWORD):
        for name in pattern.findall(goal):
            plain_word = pattern is _NAME_AFTER_KEYWORD and "_" not in name and name[:1].islower()
            if name.isidentifier() and not plain_word and name not in _IGNORED_NAMES:
                return name
    return None


_IGNORED_NAMES = frozenset(
    {"print", "len", "list", "dict", "str", "int", "float", "set", "tuple", "range", "sum", "O", "g", "e"}
)


def detect_other_language(goal: str) -> str | None:
    """Return the programming language that a goal asks for, if it is not Python."""
    if re.search(r"\bpython\b", goal, re.IGNORECASE):
        return None
    match = _LANGUAGES.search(goal)
    return match[1] if match else None


def strip_test_request(goal: str) -> str:
    """Return a goal without its request for tests.

    Tests are written in a call of their own; a small model asked for both in one prompt writes them into the code.
    """
    return _TEST_REQUEST.sub("", goal).strip() or goal


def code_messages(goal: str, texts: Sequence[tuple[str, str]], reasons: Sequence[str]) -> list[Message]:
    """Return the prompt for the code. ``texts`` are (name, text) of the goal's files."""
    file_texts = "".join(f"File {name}:\n{text[:MAX_FILE_CHARS]}\n\n" for name, text in texts)
    refused = f"\n\nAn earlier answer was refused: {' '.join(reasons)[:600]}" if reasons else ""
    return [Message.system(_CODE_PROMPT), Message.user(f"{file_texts}{strip_test_request(goal)}{refused}")]


def repair_messages(base: Sequence[Message], code: str, reasons: Sequence[str]) -> list[Message]:
    """Return the prompt for a repair, with the reasons why ``code`` was not valid."""
    listed = "\n".join(f"- {reason}" for reason in reasons[:4])
    return [
        *base,
        Message.assistant(f"```python\n{code.strip()}\n```"),
        Message.user(f"This code is wrong:\n{listed}\nFind the mistake and reply with the whole corrected code block."),
    ]


def example_messages(goal: str, head: str) -> list[Message]:
    """Return the prompt for examples. It has the signature but not the code, so that the examples are independent."""
    return [Message.system(_EXAMPLES_PROMPT), Message.user(f"Task: {goal}\nThe function: {head}")]


def class_test_messages(goal: str, head: str, module: str) -> list[Message]:
    """Return the prompt for test cases of a class, from the goal and its signature only."""
    return [Message.system(_TESTS_PROMPT), Message.user(f"Task: {goal}\nThe class, in module {module}: {head}")]


Validate = Callable[[ValidateRequest], Awaitable[ValidateResult]]
"""The judge's ``validate``."""
OnText = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class CodeSolution:
    """Code that the judge found valid, its tests, and the checks that passed."""

    filename: str
    code: str
    tests_filename: str
    tests: str
    checks: tuple[Check, ...]


def extract_module(answer: str) -> str:
    """Return the module in a model's answer: definitions only, imports complete."""
    return add_imports(keep_definitions(extract_code(answer)))


def module_name(name: str) -> str:
    """Return the module name for the definition ``name``: snake case, never a module of the standard library."""
    snake = "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
    module = snake.replace("__", "_").strip("_") or "solution"
    return f"{module}_solution" if module in sys.stdlib_module_names else module


async def validate_examples(code: str, name: str, examples: Sequence[Example], validate: Validate) -> ValidateResult:
    """Validate ``code`` with ``examples`` of its function ``name`` as tests. Raises what ``validate`` raises."""
    module = module_name(name)
    return await validate(
        ValidateRequest(
            code=code,
            filename=f"{module}.py",
            tests=render_tests(examples, module, name) if examples else "",
            tests_filename=f"test_{module}.py",
        )
    )


def build_solution(
    code: str, name: str, examples: Sequence[Example], verdict: ValidateResult, note: str, *, is_guess: bool = False
) -> CodeSolution:
    """Return the solution of the function ``name``; ``note`` says how independent its tests are.

    Solutions and examples of one model can share one wrong reading of the goal, so this check is a model's. It is not
    passed where ``is_guess``: two solutions agree with each other and not with the examples.
    """
    module = module_name(name)
    own = sum(example.is_from_goal for example in examples)
    said = f"{own} of {len(examples)} examples are the goal's own" if own else "no example is the goal's own"
    return CodeSolution(
        filename=f"{module}.py",
        code=code,
        tests_filename=f"test_{module}.py",
        tests=render_tests(examples, module, name),
        checks=(*verdict.checks, Check("independent", not is_guess, f"{note}; {said}", checked_by="model")),
    )
