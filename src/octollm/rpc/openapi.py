"""An OpenAPI 3.1 description made from the operations' types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from octollm import __version__
from octollm.contracts.problems import Problem
from octollm.rpc.call import Operation
from octollm.rpc.problems import PROBLEM_JSON
from octollm.rpc.shapes import schemas_of

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "capability": [{"bearer": []}],
    "service": [{"bearer": []}],
    "door": [{"bearer": []}, {}],
    "public": [{}],
}


def openapi_of(service: str, operations: Sequence[Operation]) -> dict[str, Any]:
    """Describe a service. Bodies and answers without a type are described as any content."""
    kinds = [kind for op in operations for kind in (op.body, op.answer) if kind not in (None, bytes)]
    schemas, components = schemas_of([*kinds, Problem])
    by_kind = dict(zip([*map(repr, kinds), repr(Problem)], schemas, strict=True))
    problem = {PROBLEM_JSON: {"schema": by_kind[repr(Problem)]}}
    paths: dict[str, dict[str, Any]] = {}
    for op in operations:
        answer = {"application/json": {"schema": by_kind[repr(op.answer)]}} if op.answer is not None else {}
        described: dict[str, Any] = {
            "operationId": f"{op.name}_{op.method.lower()}".replace(".", "_"),
            "summary": op.summary,
            "security": _SECURITY[op.auth],
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in _PARAMETER.findall(op.path)
            ],
            "responses": {
                str(op.status): {"description": "The answer.", **({"content": answer} if answer else {})},
                "default": {"description": "A problem document (RFC 9457).", "content": problem},
            },
        }
        if op.scope and op.auth == "capability":
            described["x-scope"] = op.scope
        if op.body is not None:
            content: dict[str, Any] = (
                {"application/octet-stream": {}}
                if op.body is bytes
                else {"application/json": {"schema": by_kind[repr(op.body)]}}
            )
            described["requestBody"] = {"required": True, "content": content}
        paths.setdefault(_PARAMETER.sub(r"{\1}", op.path), {})[op.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": f"OctoLLM {service}", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT chain"}},
        },
    }
