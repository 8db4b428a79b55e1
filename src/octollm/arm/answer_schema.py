"""The JSON schema that a model's answer is held to, made of a type, in the form that providers take in strict mode.

That mode wants an object at the root, nothing beside its members, and every member there.
https://platform.openai.com/docs/guides/structured-outputs
"""

from __future__ import annotations

from typing import Any, cast

from octollm.rpc.shapes import json_schemas

_REF_PREFIX = "#/components/schemas/"


def strict_schema(kind: object) -> dict[str, Any]:
    """Return the schema of ``kind``, with what it refers to in ``$defs``. Raises ``TypeError`` for a type without."""
    [schema], components = json_schemas([kind])
    root = str(schema.get("$ref", "")).removeprefix(_REF_PREFIX)
    if root:
        schema = components[root]
    shared = {
        name: _make_strict(component)
        for name, component in components.items()
        if _is_referenced(name, schema, components)
    }
    strict: dict[str, Any] = _make_strict(schema)
    return {**strict, "$defs": shared} if shared else strict


def _is_referenced(name: str, schema: object, components: dict[str, Any]) -> bool:
    """Say whether ``schema``, or what it refers to, refers to the component ``name``."""
    seen: set[str] = set()
    waiting = [schema]
    while waiting:
        for found in _find_refs(waiting.pop()):
            if found == name:
                return True
            if found not in seen:
                seen.add(found)
                waiting.append(components[found])
    return False


def _find_refs(schema: object) -> list[str]:
    if isinstance(schema, list):
        return [ref for item in cast("list[object]", schema) for ref in _find_refs(item)]
    if not isinstance(schema, dict):
        return []
    members = cast("dict[str, object]", schema)
    own = members.get("$ref")
    found = [own.removeprefix(_REF_PREFIX)] if isinstance(own, str) and own.startswith(_REF_PREFIX) else []
    return found + [ref for item in members.values() for ref in _find_refs(item)]


def _make_strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_make_strict(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    members = cast("dict[str, Any]", schema)
    made: dict[str, Any] = {}
    for name, item in members.items():
        if name == "properties":  # below it are the author's names, not the schema's
            made[name] = {own: _make_strict(member) for own, member in item.items()}
        elif name == "$ref":
            made[name] = "#/$defs/" + item.removeprefix(_REF_PREFIX)
        elif name != "default":
            made[name] = _make_strict(item)
    if made.get("type") == "object" and "properties" in made:
        made["additionalProperties"] = False
        made["required"] = list(made["properties"])
    return made
