"""The program that calls solutions with the same examples in the sandbox, to compare their outputs.

Usage: ``python <this file> NAME MODULE…``; ``examples.json`` holds ``[[call, expected, kind], …]``. It prints one line
as each module ends: the marker, then JSON with the module and, for each example, ``[passed, output]``.
"""

import importlib
import io
import json
import os
import pathlib
import sys

MARKER = "octollm-probe:"
MAX_TEXT = 300


def main(name: str, modules: list[str]) -> None:
    """Call every solution with every example."""
    real_stdout, sys.stdout = sys.stdout, io.StringIO()
    examples = json.loads(pathlib.Path("examples.json").read_text("utf-8"))
    for module in modules:
        outcomes = [probe(module, name, *example) for example in examples]
        # Flushed, so that the output of this module is known even if the next one never ends.
        real_stdout.write("\n" + MARKER + json.dumps({module: outcomes}) + "\n")
        real_stdout.flush()
    # Not sys.exit: an atexit handler or thread of a solution could print a forged result line.
    os._exit(0)


def probe(module: str, name: str, call: str, expected: str, kind: str) -> tuple[bool, str]:
    """Return whether one example passes, and the value or error of its call."""
    try:
        scope = {name: getattr(importlib.import_module(module), name)}
        value = eval(call, scope)  # noqa: S307 - the sandbox is where the model's code runs
    except BaseException as error:
        error_type = type(error)
        expected_name = expected if kind == "raises" else ""
        return expected_name in {base.__name__ for base in error_type.__mro__}, f"raises {error_type.__name__}"
    if kind == "raises":
        return False, show(value)
    return same(value, eval(expected, {})), show(value)  # noqa: S307


def same(value: object, expected: object) -> bool:
    """Compare as the generated tests do: floats to six places."""
    if isinstance(expected, float) and isinstance(value, int | float):
        return abs(value - expected) < 5e-7
    return bool(value == expected)


def show(value: object) -> str:
    """Return a canonical text of a value: floats to nine digits, so that rounding errors do not look different."""
    return (f"{value:.9g}" if isinstance(value, float) else repr(value))[:MAX_TEXT]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
