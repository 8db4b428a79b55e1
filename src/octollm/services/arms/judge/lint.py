"""Faults that show without running code: names that nothing defines, and the like. Style is no fault here."""

from __future__ import annotations

import ast

from pyflakes import checker, messages

MAX_LINT_REASONS = 5
_LINT_ERRORS = (
    messages.UndefinedName,
    messages.UndefinedLocal,
    messages.UndefinedExport,
    messages.DuplicateArgument,
    messages.ReturnOutsideFunction,
    messages.YieldOutsideFunction,
    messages.ContinueOutsideLoop,
    messages.BreakOutsideLoop,
    messages.TwoStarredExpressions,
    messages.TooManyExpressionsInStarredAssignment,
    messages.RaiseNotImplemented,
    messages.ForwardAnnotationSyntaxError,
    messages.StringDotFormatMissingArgument,
    messages.PercentFormatPositionalCountMismatch,
    messages.PercentFormatMissingArgument,
)


def lint(tree: ast.Module, filename: str) -> list[str]:
    """Return the real errors that pyflakes sees, in the order of their lines, at most a few."""
    found = [
        message for message in checker.Checker(tree, filename=filename).messages if isinstance(message, _LINT_ERRORS)
    ]
    found.sort(key=lambda message: message.lineno)
    texts = [f"Line {m.lineno} of {filename}: {m.message % m.message_args}" for m in found]
    return list(dict.fromkeys(texts))[:MAX_LINT_REASONS]
