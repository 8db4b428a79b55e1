"""A reader of the Compose file: enough of the format to check it and to carry it out without an engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[2] / "deploy" / "compose.yaml"
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


class MissingVariableError(Exception):
    """A variable that the file insists on is not set."""


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Fill in ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?what to do}`` as Compose does."""

    def fill(match: re.Match[str]) -> str:
        value = variables.get(match[1], "")
        if value:
            return value
        if match[2] == "?":
            raise MissingVariableError(f"{match[1]}: {match[3]}")
        return match[3] or ""

    return _VARIABLE.sub(fill, text)


def compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the file's content, merged and filled in, without its extension fields."""

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: filled(value) for name, value in node.items() if not str(name).startswith("x-")}
        if isinstance(node, list):
            return [filled(value) for value in node]
        return interpolated(node, variables) if isinstance(node, str) else node

    return filled(yaml.safe_load(FILE.read_text()))
