"""An arm: a name, what it does, what it calls, and its operations."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from octollm.arm.context import Context
from octollm.arm.validation import (
    arm_invalid,
    check_calls,
    check_description,
    check_name,
    check_operation,
    check_port,
    resolve_types,
)
from octollm.capability import Declarations, DeclaredCall
from octollm.contracts.declarations import OPTIONAL_MARK
from octollm.contracts.services import OperationKind

if TYPE_CHECKING:
    from pydantic_ai import Agent

ArmHandler = Callable[[Any, Context], Awaitable[Any]]
H = TypeVar("H", bound=ArmHandler)

DEFAULT_PORT = 8110
"""The first port behind those of the built-in services."""
OPERATION_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class ArmOperation:
    """One operation: ``POST /<name>``, opened by ``<arm>:<name>``; types from the function's annotations."""

    name: str
    handler: ArmHandler
    kind: OperationKind
    body: Any
    answer: Any
    summary: str
    timeout: float
    example: object = None
    codes: Sequence[str] = ()


class Arm:
    """An arm. ``calls`` are the scopes that it calls directly; nothing else will be allowed.

    Where the caller's authority does not cover one of ``calls``, the work is refused before it begins; without one
    of ``optional_calls`` it is done, and ``ctx.may`` tells. ``accepts`` holds words on which code chooses arms, such
    as ``files:tabular``, ``files:text`` or ``files:none``. Raises ``arm_invalid`` for whatever is wrong.
    """

    def __init__(
        self,
        name: str,
        description: str,
        port: int = DEFAULT_PORT,
        *,
        calls: Sequence[str] = (),
        optional_calls: Sequence[str] = (),
        accepts: Sequence[str] = (),
    ) -> None:
        self._initialise(name, description, port, calls, optional_calls, accepts, built_in=False)

    def _initialise(
        self,
        name: str,
        description: str,
        port: int,
        calls: Sequence[str],
        optional_calls: Sequence[str],
        accepts: Sequence[str],
        *,
        built_in: bool,
    ) -> None:
        check_name(name, built_in=built_in)
        check_description(name, description)
        check_port(name, port)
        self.name = name
        self.description = description
        self.port = port
        self.required_scopes = check_calls(name, calls)
        self.optional_scopes = check_calls(name, optional_calls)
        self.accepts = tuple(accepts)
        self.operations: list[ArmOperation] = []

    @property
    def declared_calls(self) -> tuple[str, ...]:
        """Return the calls as they are told to the orchestrator: ``?`` before one without which the arm still works."""
        return (
            *(scope.text for scope in self.required_scopes),
            *(OPTIONAL_MARK + scope.text for scope in self.optional_scopes),
        )

    @classmethod
    def built_in(
        cls, name: str, description: str, port: int, *, calls: Sequence[str] = (), accepts: Sequence[str] = ()
    ) -> Arm:
        """Return one of OctoLLM's own arms, whose names are reserved."""
        arm = cls.__new__(cls)
        arm._initialise(name, description, port, calls, (), accepts, built_in=True)
        return arm

    @classmethod
    def from_agent(
        cls,
        agent: Agent[Any, Any],
        *,
        name: str,
        description: str,
        port: int = DEFAULT_PORT,
        calls: Sequence[str] = ("models:chat",),
        optional_calls: Sequence[str] = (),
        accepts: Sequence[str] = (),
    ) -> Arm:
        """Return an arm whose ``execute`` runs a Pydantic AI agent on the task's goal.

        Its model calls go to the ``models`` service with the authority of the call, whatever model the agent names.
        An agent with ``deps_type=Context`` is given the call's context. Needs the extra ``agents``.
        """
        try:
            from octollm.arm.agents import execute_with  # noqa: PLC0415  the extra is needed here alone
        except ImportError as error:
            raise arm_invalid("An agent as an arm needs Pydantic AI: pip install 'octollm[agents]'.") from error
        arm = cls(name, description, port, calls=calls, optional_calls=optional_calls, accepts=accepts)
        arm.operation("execute")(execute_with(agent, arm.name))
        return arm

    @property
    def calls(self) -> tuple[str, ...]:
        """Return the scopes of all declared calls."""
        return tuple(scope.text for scope in (*self.required_scopes, *self.optional_scopes))

    def declarations(self) -> Declarations:
        """Return what each operation calls directly: from it follows what a caller's grant has to hold."""
        calls = (
            *(DeclaredCall(scope.text) for scope in self.required_scopes),
            *(DeclaredCall(scope.text, optional=True) for scope in self.optional_scopes),
        )
        return {f"{self.name}:{declared.name}": calls for declared in self.operations}

    def operation(
        self,
        name: str | None = None,
        *,
        kind: OperationKind = "idempotent",
        timeout: float = OPERATION_SECONDS,
        example: object = None,
        codes: Sequence[str] = (),
    ) -> Callable[[H], H]:
        """Declare ``async def handler(body, ctx)`` as an operation; its name is the function's unless given.

        ``kind`` is ``safe`` for one without effects, ``once`` for one that must never be done twice. ``timeout`` is
        in seconds, for a caller that names no deadline. ``execute`` is what the orchestrator calls with a ``Task``;
        whatever it answers becomes an ``ExecuteResult``. ``example`` is a body and ``codes`` are error codes that the
        arm's description tells of. Raises ``arm_invalid``.
        """

        def declare(handler: H) -> H:
            called = name or getattr(handler, "__name__", "")
            check_operation(self.name, called, kind, (declared.name for declared in self.operations))
            body, answer = resolve_types(self.name, called, handler)
            summary = (inspect.getdoc(handler) or "").split("\n", 1)[0]
            self.operations.append(ArmOperation(called, handler, kind, body, answer, summary, timeout, example, codes))
            return handler

        return declare
