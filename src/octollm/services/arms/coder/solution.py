"""What writing code comes to: the module, its tests, and the rules that any solution has to keep."""

from __future__ import annotations

import ast
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from octollm.contracts.operations import ValidateRequest, ValidateResult
from octollm.contracts.task import Check
from octollm.services.arms.coder.examples import Example
from octollm.services.arms.coder.imports import add_imports
from octollm.services.arms.coder.parse import extract_code, keep_definitions, try_parse

Validate = Callable[[ValidateRequest], Awaitable[ValidateResult]]
"""The judge's ``validate``."""
OnText = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class CodeSolution:
    """Code that the judge found valid, its tests, and the checks that were done."""

    filename: str
    code: str
    tests_filename: str
    tests: str
    checks: tuple[Check, ...]


def extract_module(answer: str) -> str:
    """Return the module in a model's answer: definitions only, imports complete."""
    return add_imports(keep_definitions(extract_code(answer)))


def module_name(name: str) -> str:
    """Return the module's name for what is called ``name``: lower case with underscores, never one of the library's."""
    snake = "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
    module = snake.replace("__", "_").strip("_") or "solution"
    return f"{module}_solution" if module in sys.stdlib_module_names else module


def hardcodes_answers(code: str, examples: Sequence[Example]) -> bool:
    """Return whether code holds the inputs of most examples: an answer learnt by heart, not computed."""
    tree = try_parse(code)
    held: set[str] = set()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            held.add(node.value)
    inputs = [
        {n.value for n in ast.walk(ast.parse(e.call)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        for e in examples
    ]
    long = [{text for text in texts if len(text) > 3} for texts in inputs]
    long = [texts for texts in long if texts]
    return len(long) >= 2 and sum(bool(texts & held) for texts in long) * 2 > len(long)
