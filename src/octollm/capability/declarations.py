"""What each operation of the built-in services calls directly.

The table has one row per operation of a built-in service. An arm of one's own declares its rows in its own
code; a joining arm may declare at most what its join secret allows.
"""

from __future__ import annotations

from types import MappingProxyType

from octollm.capability.may import Declarations, DeclaredCall


def _required(scope: str) -> DeclaredCall:
    return DeclaredCall(scope)


def _optional(scope: str) -> DeclaredCall:
    return DeclaredCall(scope, optional=True)


BUILT_IN_CALLS: Declarations = MappingProxyType(
    {
        "planner:plan": (_required("models:chat"),),
        "planner:execute": (_required("models:chat"), _required("executor:run")),
        "coder:execute": (
            _required("models:chat"),
            _required("judge:validate"),
            _required("executor:run"),
            _optional("files:read"),
            _required("files:write"),
        ),
        "judge:validate": (_optional("executor:run"),),
        "judge:accept": (_optional("executor:run"), _optional("files:read"), _optional("models:chat")),
        "judge:execute": (_optional("executor:run"), _optional("files:read")),
        "retriever:search": (_required("memory:read"),),
        "retriever:execute": (_required("memory:read"), _required("models:chat")),
        "executor:execute": (_optional("files:read"), _optional("files:write")),
        "executor:run": (_optional("files:read"),),
        "executor:http": (),
        "memory:read": (),
        "memory:write": (),
        "models:chat": (),
        "models:embeddings": (),
        "files:read": (),
        "files:write": (),
    }
)
"""The direct calls of the built-in services. An operation that is not here calls nothing."""
