"""What each operation of the built-in services calls directly.

The table has one row per operation of a built-in service. An arm of one's own declares its rows in its own
code; a joining arm may declare at most what its join secret allows.
"""

from __future__ import annotations

from types import MappingProxyType

from octollm.capability.may import Call, Declarations


def _needs(scope: str) -> Call:
    return Call(scope)


def _may_use(scope: str) -> Call:
    return Call(scope, optional=True)


BUILT_IN_CALLS: Declarations = MappingProxyType(
    {
        "planner:plan": (_needs("models:chat"),),
        "planner:execute": (_needs("models:chat"), _needs("executor:run")),
        "coder:execute": (
            _needs("models:chat"),
            _needs("judge:validate"),
            _needs("executor:run"),
            _may_use("files:read"),
            _needs("files:write"),
        ),
        "judge:validate": (_may_use("executor:run"),),
        "judge:accept": (_may_use("executor:run"), _may_use("files:read"), _may_use("models:chat")),
        "judge:execute": (_may_use("executor:run"), _may_use("files:read")),
        "retriever:search": (_needs("memory:read"),),
        "retriever:execute": (_needs("memory:read"), _needs("models:chat")),
        "executor:execute": (_may_use("files:read"), _may_use("files:write")),
        "executor:run": (_may_use("files:read"),),
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
