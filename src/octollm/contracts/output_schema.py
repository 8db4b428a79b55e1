"""A typed output: the criterion that carries its JSON Schema, and the JSON document in an output.

The client writes the criterion, the judge reads it and verifies the output, so a result that does not fit is repeated
like any other that is not accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

MAX_OUTPUT_SCHEMA = 8000
"""Characters of the criterion."""

_PREFIX = "The output is one JSON document and nothing else, valid against this JSON Schema: "
_FENCE = re.compile(r"```[a-zA-Z]*\n(.*)\n```", re.DOTALL)


def format_output_criterion(schema: Mapping[str, Any]) -> str:
    """Return the criterion for an output that is valid against ``schema``."""
    return _PREFIX + msgspec.json.encode(schema).decode()


def find_output_schema(criteria: Iterable[str]) -> dict[str, Any] | None:
    """Return the schema of the first such criterion; ``None`` without one, or where it holds no JSON object."""
    for criterion in criteria:
        if criterion.startswith(_PREFIX):
            try:
                return msgspec.json.decode(criterion.removeprefix(_PREFIX), type=dict[str, Any])
            except msgspec.DecodeError:
                return None
    return None


def extract_json(output: str) -> str:
    """Return the JSON document of an output: without white space around it, and without one code fence around it."""
    text = output.strip()
    fenced = _FENCE.fullmatch(text)
    return fenced[1] if fenced else text
