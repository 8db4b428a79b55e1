"""Validation of an arm's declaration, before anything runs: name, calls, operations and types.

Each error says what to write instead.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, get_args, get_type_hints

from octollm.arm.references import CallTo, OperationReference
from octollm.capability import Scope
from octollm.capability.errors import CapabilityError
from octollm.contracts.services import BUILT_IN_ARMS, ORCHESTRATOR_FAMILIES, SERVICES, OperationKind
from octollm.contracts.task import Task
from octollm.errors import ArmError
from octollm.rpc.codec import json_schemas

EXECUTE = "execute"
"""The operation that the orchestrator calls with a step of a task."""
MAX_DESCRIPTION = 500
"""Characters of a description. It is part of every planning prompt, so its tokens are paid for each task."""
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_OPERATION = re.compile(r"[a-z][a-z0-9_]{0,39}")
_RESERVED_PATHS = frozenset({"health", "ready", "metrics", "docs"})
_HANDLER_FORM = "async def {name}(body: Type, ctx: Context) -> Type"


def check_name(name: str, *, built_in: bool) -> None:
    """Raise ``arm_invalid`` unless the name is valid and not reserved."""
    if built_in:
        if name not in BUILT_IN_ARMS:
            raise ArmError(f"{name!r} is not a built-in arm; write Arm({name!r}, …).")
        return
    if _NAME.fullmatch(name) is None:
        raise ArmError(
            f"An arm cannot be called {name!r}: a name is 1 to 40 of a-z, 0-9, _ and -, and begins with a letter, "
            "e.g. 'translator'."
        )
    if name in SERVICES or name in ORCHESTRATOR_FAMILIES:
        raise ArmError(f"The name {name!r} is reserved for OctoLLM's own services; choose another.")


def check_description(name: str, description: str) -> None:
    """Raise ``arm_invalid`` for a description that is empty or too long."""
    if not description.strip() or len(description) > MAX_DESCRIPTION:
        raise ArmError(
            f"The arm {name} needs a description of up to {MAX_DESCRIPTION} characters: the planner chooses arms by it."
        )


def check_approval(name: str, reason: str) -> str:
    """Return ``reason``, which may be empty; raise ``arm_invalid`` for one that is too long."""
    if len(reason) > MAX_DESCRIPTION:
        raise ArmError(f"approval of the arm {name} may have {MAX_DESCRIPTION} characters: one sentence that says why.")
    return reason.strip()


def check_lifespan(name: str, lifespan: object) -> None:
    """Raise ``arm_invalid`` for a lifespan that is not callable, or lacks ``@asynccontextmanager``."""
    right = "write @asynccontextmanager above `async def lifespan():`, which yields the state once."
    if lifespan is not None and not callable(lifespan):
        raise ArmError(f"The lifespan of the arm {name} is not a function: {right}")
    if inspect.isasyncgenfunction(lifespan) or inspect.iscoroutinefunction(lifespan):
        raise ArmError(f"The lifespan of the arm {name} is not an asynchronous context manager: {right}")


def check_calls(name: str, calls: Iterable[CallTo] | CallTo) -> tuple[Scope, ...]:
    """Return declared calls as scopes; raise ``arm_invalid`` for a malformed one, and for one that is not in a list."""
    if isinstance(calls, OperationReference):
        raise ArmError(f"calls of the arm {name} must be a list: calls=[{calls}].")
    # A string is a sequence too, so each of its characters would be taken for a call.
    if isinstance(calls, str):
        raise ArmError(f"calls of the arm {name} must be a list: calls=[{calls!r}].")
    scopes: list[Scope] = []
    for call in calls:
        text = str(call)
        try:
            scopes.append(Scope(text))
        except CapabilityError as error:
            raise ArmError(
                f"{text!r} in the calls of the arm {name} is no scope; one looks like 'retriever:search': "
                "<service>:<operation>."
            ) from error
    return tuple(scopes)


def check_operation(arm: str, name: str, kind: str, existing: Iterable[str]) -> None:
    """Raise ``arm_invalid`` for an operation with a malformed or duplicate name, or an unknown kind."""
    if _OPERATION.fullmatch(name) is None:
        raise ArmError(
            f"{arm} cannot have an operation {name!r}: a name is 1 to 40 of a-z, 0-9 and _, and begins with a letter."
        )
    if name in _RESERVED_PATHS:
        raise ArmError(f"{arm} cannot have an operation {name!r}: every service already serves /{name} itself.")
    if name in existing:
        raise ArmError(f"{arm} already has an operation {name!r}; give this one another name: @arm.operation('…').")
    kinds = get_args(OperationKind)
    if kind not in kinds:
        raise ArmError(f"{arm}:{name} cannot be of kind {kind!r}; kinds are {', '.join(kinds)}.")


def resolve_types(arm: str, name: str, handler: Callable[..., Any]) -> tuple[Any, Any]:
    """Return the types of a handler's body and answer; raise ``arm_invalid`` if they are missing or unsupported."""
    form = _HANDLER_FORM.format(name=name)
    if not inspect.iscoroutinefunction(handler):
        raise ArmError(f"{arm}:{name} must be a coroutine: {form}.")
    try:
        hints = get_type_hints(handler, include_extras=True)
    except NameError as error:
        raise ArmError(
            f"A type of {arm}:{name} is not known ({error}); define it at the top of the module, not inside a function."
        ) from error
    parameters = [*inspect.signature(handler).parameters]
    if len(parameters) != 2:
        raise ArmError(f"{arm}:{name} takes {len(parameters)} parameters; it must be {form}.")
    missing = [what for what in (parameters[0], "return") if what not in hints]
    if missing:
        raise ArmError(f"{arm}:{name} has no type for {' and '.join(missing)}; write {form}.")
    body, answer = hints[parameters[0]], hints["return"]
    if name == EXECUTE and body is not Task:
        raise ArmError(f"{arm}:execute is given a task: async def execute(task: Task, ctx: Context) -> str.")
    for what, kind in (("body", body), ("answer", answer)):
        _check_type(arm, name, what, kind)
    return body, answer


def _check_type(arm: str, name: str, what: str, kind: Any) -> None:
    try:
        if kind in (bytes, type(None)):
            raise TypeError(kind)
        json_schemas([kind])
    except (TypeError, NotImplementedError, ValueError) as error:
        raise ArmError(
            f"The {what} of {arm}:{name} cannot be {kind!r}: use a dataclass, a msgspec Struct, a Pydantic model, a "
            "TypedDict or NamedTuple, str, int, float, bool, an enum, a Literal, a date or time, a UUID, or a list, "
            "tuple, set, dict or union of these."
        ) from error
