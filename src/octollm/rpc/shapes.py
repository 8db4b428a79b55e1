"""Types of bodies and answers: whatever msgspec knows (Structs, dataclasses, builtins), and Pydantic models.

Pydantic is not imported: a model is known by its methods, and only who uses one has it installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard, cast

import msgspec

from octollm.errors import FieldError


def is_pydantic(kind: object) -> TypeGuard[type[Any]]:
    """Say whether ``kind`` is a Pydantic model."""
    return isinstance(kind, type) and hasattr(kind, "model_validate") and hasattr(kind, "model_json_schema")


def encode(value: object) -> bytes:
    """Return ``value`` as JSON. Raises ``TypeError`` for what no JSON stands for."""
    return msgspec.json.encode(value, enc_hook=_encode_model)


def convert(value: object, type_: Any) -> Any:
    """Make a ``kind`` of JSON's builtins. Raises ``msgspec.ValidationError``."""
    return msgspec.convert(value, type_, dec_hook=decode_model)


def decode_model(kind: type[Any], value: object) -> Any:
    """Make a Pydantic model of JSON's builtins: msgspec's ``dec_hook``."""
    if is_pydantic(kind):
        # From JSON, where a text may stand for a date even in a strict model.
        return kind.model_validate_json(msgspec.json.encode(value))
    if isinstance(value, kind):  # ``object`` is any JSON
        return value
    raise NotImplementedError(kind)


def _encode_model(value: Any) -> object:
    if not is_pydantic(cast("object", type(value))):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return value.model_dump(mode="json", by_alias=True)


def json_schemas(kinds: Iterable[object]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a JSON schema for each of ``kinds``, and the components that they refer to (OpenAPI 3.1).

    Raises ``TypeError`` for a type that has none.
    """
    found: dict[str, Any] = {}

    def schema_of(kind: type[Any]) -> dict[str, Any]:
        if kind is object:
            return {"description": "Any JSON."}  # an empty schema would count as none
        if not is_pydantic(kind):
            raise NotImplementedError(kind)
        schema: dict[str, Any] = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        found.update(schema.pop("$defs", {}))
        return schema

    schemas, components = msgspec.json.schema_components(
        list(kinds), schema_hook=schema_of, ref_template="#/components/schemas/{name}"
    )
    return list(schemas), {**found, **components}


def pydantic_faults(error: BaseException | None, at: str) -> tuple[FieldError, ...]:
    """Return the faults that a Pydantic model found in a value at the pointer ``at``; none for another error."""
    found: Any = error
    if not (hasattr(found, "errors") and hasattr(found, "error_count")):
        return ()
    return tuple(
        FieldError(at + "".join("/" + escape_pointer(str(part)) for part in fault["loc"]), fault["msg"])
        for fault in found.errors(include_url=False, include_context=False, include_input=False)[:20]
    )


def escape_pointer(part: str) -> str:
    """Return one part of a JSON Pointer (RFC 6901 section 3)."""
    return part.replace("~", "~0").replace("/", "~1")
