"""Whether a text is Python at all."""

from __future__ import annotations

import ast
import warnings

MAX_CODE_CHARS = 200_000
"""Characters of code that are looked at; more is refused."""


def parse_python(code: str, filename: str) -> tuple[ast.Module | None, str]:
    """Return the tree of ``solve_code_goal``, or ``None`` and the reason why there is none."""
    if len(code) > MAX_CODE_CHARS:
        return None, f"{filename} is longer than {MAX_CODE_CHARS} characters."
    if not code.strip():
        return None, f"{filename} is empty."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(code, filename=filename)
            compile(tree, filename, "exec", dont_inherit=True)
    except SyntaxError as error:
        line = (error.text or "").strip()[:120]
        at = f" at line {error.lineno}" if error.lineno else ""
        return None, f"Syntax error in {filename}{at}: {error.msg}" + (f": {line}" if line else "")
    except (ValueError, RecursionError, MemoryError) as error:
        return None, f"{filename} cannot be compiled: {str(error)[:200] or type(error).__name__}"
    return tree, ""
