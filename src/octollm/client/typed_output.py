"""Typed results: the JSON Schema of an output type, and decoding a task's output as a value of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, cast

import msgspec
from typing_extensions import TypeVar

from octollm.client.errors import InvalidRequest, OutputInvalid
from octollm.contracts.api import TaskView
from octollm.contracts.output_schema import MAX_OUTPUT_SCHEMA, extract_json, format_output_criterion
from octollm.errors import FieldError

OutputT = TypeVar("OutputT", default=str)
"""The type of a task's result."""

_PATH_PART = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


class _PydanticModel(Protocol):
    """The part of a Pydantic model class that is used. Pydantic itself is no dependency."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...

    @classmethod
    def model_validate_json(cls, json_data: str) -> Any: ...


def describe_output(output: type[Any]) -> tuple[str, ...]:
    """Return the criteria that ask for an output of this type; none for ``str``.

    Raises :class:`InvalidRequest` (``output_type_invalid``) for a type without a JSON Schema, or with one that is too
    long to be sent.
    """
    if output is str:
        return ()
    name = getattr(output, "__name__", str(output))
    try:
        schema = _pydantic(output).model_json_schema() if _is_pydantic(output) else msgspec.json.schema(output)
    except Exception as error:
        # msgspec raises TypeError or RuntimeError, Pydantic its own errors: all mean that the type cannot be described.
        raise InvalidRequest(f"{name} has no JSON Schema: {error}", code="output_type_invalid") from error
    criterion = format_output_criterion(schema)
    if len(criterion) > MAX_OUTPUT_SCHEMA:
        raise InvalidRequest(
            f"The JSON Schema of {name} has {len(criterion):,} characters; at most {MAX_OUTPUT_SCHEMA:,} are allowed.",
            code="output_type_invalid",
        )
    return (criterion,)


def decode_output(task: TaskView, output: type[OutputT]) -> OutputT:
    """Return a completed task's output as a value of this type; ``str`` gets the text itself.

    Raises :class:`OutputInvalid` with a pointer to each fault.
    """
    if output is str:
        return cast("OutputT", task.output)
    text = extract_json(task.output)
    if _is_pydantic(output):
        try:
            return _pydantic(output).model_validate_json(text)
        except ValueError as error:
            raise OutputInvalid(task, output, _pydantic_faults(error)) from error
    try:
        return msgspec.json.decode(text, type=output)
    except msgspec.ValidationError as error:
        detail, _at, path = str(error).partition(" - at `")
        raise OutputInvalid(task, output, [FieldError(_pointer(path), detail)]) from error
    except msgspec.DecodeError as error:
        raise OutputInvalid(task, output, [FieldError("", f"It is not JSON: {error}")]) from error


def _is_pydantic(output: type[Any]) -> bool:
    return hasattr(output, "model_validate_json") and hasattr(output, "model_json_schema")


def _pydantic(output: type[Any]) -> _PydanticModel:
    return cast("_PydanticModel", output)


def _pydantic_faults(error: ValueError) -> list[FieldError]:
    errors = cast("list[dict[str, Any]]", cast("Any", error).errors()) if hasattr(error, "errors") else []
    faults = [FieldError(_join(fault["loc"]), str(fault["msg"])) for fault in errors]
    return faults or [FieldError("", str(error))]


def _pointer(path: str) -> str:
    """Return a msgspec path such as ``$.items[0].name`` as a JSON Pointer (RFC 6901)."""
    return _join([name or index for name, index in _PATH_PART.findall(path.rstrip("`"))])


def _join(parts: Sequence[object]) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
