"""Arm: its name, description, declared calls and operations."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, cast, overload

from octollm.arm.context import Context
from octollm.arm.references import CallTo
from octollm.arm.validation import (
    check_approval,
    check_calls,
    check_description,
    check_lifespan,
    check_name,
    check_operation,
    resolve_types,
)
from octollm.capability import Declarations, DeclaredCall, Scope
from octollm.contracts.declarations import OPTIONAL_MARK
from octollm.contracts.services import OperationKind
from octollm.errors import ArmError, OctoError

if TYPE_CHECKING:
    from typing import Never

    from pydantic_ai import Agent
    from typing_extensions import TypeVar

    StateT = TypeVar("StateT", default=None)
else:
    from typing import Never, TypeVar

    StateT = TypeVar("StateT")
BodyT = TypeVar("BodyT")
AnswerT = TypeVar("AnswerT")
Lifespan = Callable[[], AbstractAsyncContextManager[StateT]]
"""An ``@asynccontextmanager`` function that opens and closes what all calls share, such as a database pool."""

OPERATION_SECONDS = 600.0
"""Time limit of an operation whose caller sets no deadline."""


@dataclass(frozen=True, slots=True)
class ArmOperation:
    """One operation: ``POST /<name>`` with the scope ``<arm>:<name>``; the types come from the function's annotations.

    It may call only ``calls`` and ``optional_calls``; ``has_own_calls`` is true if they replace the arm's.
    """

    name: str
    handler: Callable[[Any, Context[Any]], Awaitable[Any]]
    kind: OperationKind
    body: Any
    answer: Any
    summary: str
    timeout: float
    calls: tuple[Scope, ...] = ()
    optional_calls: tuple[Scope, ...] = ()
    has_own_calls: bool = False
    example: object = None
    codes: Sequence[str] = ()

    @property
    def declared_calls(self) -> tuple[str, ...]:
        """Return the calls in the format of the registration: optional ones are prefixed with ``?``."""
        return _mark_optional(self.calls, self.optional_calls)


class Arm(Generic[StateT]):
    """An arm.

    ``calls`` are the operations of other services that its operations may call, as scopes or references; all others
    are refused. If the caller's authority does not cover one of ``calls``, the request is refused before it starts;
    if it does not cover one of ``optional_calls``, the request runs, and ``ctx.allows`` returns ``False``. An operation
    may declare its own calls instead. ``accepts`` has the kinds of work for the rule-based planner, such as
    ``files:tabular``, ``files:text`` or ``files:none``. With ``approval``, a sentence that says why, each step of the
    arm waits until a person has approved it: for an arm whose work has effects that cannot be undone.

    ``lifespan`` opens shared resources before the arm serves, and closes them after the last call; the value that it
    yields is ``ctx.state``. Raises ``arm_invalid`` for an invalid declaration.
    """

    def __init__(
        self,
        name: str,
        description: str,
        *,
        calls: Sequence[CallTo] = (),
        optional_calls: Sequence[CallTo] = (),
        accepts: Sequence[str] = (),
        approval: str = "",
        lifespan: Lifespan[StateT] | None = None,
        **removed: Never,
    ) -> None:
        if "port" in removed:
            raise ArmError(
                f"The arm {name} has a port in its code. Leave port= out: a port belongs to a deployment, and is set by"
                " `octollm serve --port` or OCTOLLM_PORT."
            )
        if removed:
            raise TypeError(f"Arm() has no argument {', '.join(removed)}")
        self._initialise(name, description, calls, optional_calls, accepts, lifespan, built_in=False)
        self.approval = check_approval(name, approval)

    def _initialise(
        self,
        name: str,
        description: str,
        calls: Sequence[CallTo],
        optional_calls: Sequence[CallTo],
        accepts: Sequence[str],
        lifespan: Lifespan[StateT] | None,
        *,
        built_in: bool,
    ) -> None:
        check_name(name, built_in=built_in)
        check_description(name, description)
        check_lifespan(name, lifespan)
        self.name = name
        self.description = description
        self.required_scopes = check_calls(name, calls)
        self.optional_scopes = check_calls(name, optional_calls)
        self.accepts = tuple(accepts)
        self.approval = ""
        self.operations: list[ArmOperation] = []
        self._lifespan = lifespan

    @classmethod
    def built_in(
        cls, name: str, description: str, *, calls: Sequence[CallTo] = (), accepts: Sequence[str] = ()
    ) -> Arm[StateT]:
        """Return one of OctoLLM's built-in arms, whose names are reserved."""
        arm = cls.__new__(cls)
        arm._initialise(name, description, calls, (), accepts, None, built_in=True)
        return arm

    @classmethod
    def from_agent(
        cls,
        agent: Agent[Any, Any],
        *,
        name: str,
        description: str,
        calls: Sequence[CallTo] = ("models:chat",),
        optional_calls: Sequence[CallTo] = (),
        accepts: Sequence[str] = (),
    ) -> Arm[StateT]:
        """Return an arm whose ``execute`` runs a Pydantic AI agent on the task's goal.

        Its model calls go to the ``models`` service with the authority of the call; the agent's own model setting is
        ignored. An agent with ``deps_type=Context`` gets the call's context. Needs the extra ``agents``.
        """
        try:
            from octollm.arm.agents import execute_with  # noqa: PLC0415  only this method needs the extra
        except ImportError as error:
            raise ArmError("An agent as an arm needs Pydantic AI: pip install 'octollm[agents]'.") from error
        arm = cls(name, description, calls=calls, optional_calls=optional_calls, accepts=accepts)
        arm.operation("execute")(execute_with(agent, arm.name))
        return arm

    @property
    def calls(self) -> tuple[str, ...]:
        """Return the scopes of all declared calls, of the arm and of its operations."""
        return tuple(scope.text for scope in (*self._required(), *self._optional()))

    @property
    def declared_calls(self) -> tuple[str, ...]:
        """Return all declared calls in the format of the registration: those that no operation requires have ``?``."""
        return _mark_optional(self._required(), self._optional())

    def declarations(self) -> Declarations:
        """Return the direct calls of each operation, from which the grants of its callers are derived."""
        return {
            f"{self.name}:{declared.name}": (
                *(DeclaredCall(scope.text) for scope in declared.calls),
                *(DeclaredCall(scope.text, optional=True) for scope in declared.optional_calls),
            )
            for declared in self.operations
        }

    def _required(self) -> tuple[Scope, ...]:
        own = (scope for declared in self.operations for scope in declared.calls)
        return tuple(dict.fromkeys((*self.required_scopes, *own)))

    def _optional(self) -> tuple[Scope, ...]:
        required = self._required()
        own = (scope for declared in self.operations for scope in declared.optional_calls)
        # A call that one operation requires is required of the arm, even if another operation declares it optional.
        return tuple(scope for scope in dict.fromkeys((*self.optional_scopes, *own)) if scope not in required)

    @asynccontextmanager
    async def open_state(self) -> AsyncGenerator[StateT]:
        """Open the lifespan and yield its state (``None`` without one); close it at the end.

        Raises ``arm_start_failed`` with the cause when the lifespan fails to open; an ``OctoError`` passes unchanged.
        """
        if self._lifespan is None:
            yield None  # pyright: ignore[reportReturnType]  without a lifespan StateT is None
            return
        async with AsyncExitStack() as stack:
            try:
                state = await stack.enter_async_context(self._lifespan())
            except OctoError:
                raise
            except Exception as error:
                raise OctoError(
                    f"The arm {self.name} cannot start: its lifespan raised {type(error).__name__}: {error}"[:500],
                    code="arm_start_failed",
                ) from error
            yield state

    @overload
    def operation(
        self, handler: Callable[[BodyT, Context[StateT]], Awaitable[AnswerT]], /
    ) -> Callable[[BodyT, Context[StateT]], Awaitable[AnswerT]]: ...

    @overload
    def operation(
        self,
        name: str | None = None,
        /,
        *,
        kind: OperationKind = "idempotent",
        calls: Sequence[CallTo] | None = None,
        optional_calls: Sequence[CallTo] | None = None,
        timeout: float = OPERATION_SECONDS,
        example: object = None,
        codes: Sequence[str] = (),
    ) -> Callable[
        [Callable[[BodyT, Context[StateT]], Awaitable[AnswerT]]],
        Callable[[BodyT, Context[StateT]], Awaitable[AnswerT]],
    ]: ...

    def operation(
        self,
        name: Any = None,
        /,
        *,
        kind: OperationKind = "idempotent",
        calls: Sequence[CallTo] | None = None,
        optional_calls: Sequence[CallTo] | None = None,
        timeout: float = OPERATION_SECONDS,
        example: object = None,
        codes: Sequence[str] = (),
    ) -> Any:
        """Declare ``async def handler(body, ctx)`` as an operation, bare or with arguments.

        ``name`` is by default that of the function. ``kind`` is ``read_only`` for an operation without effects,
        ``idempotent`` for one that may be repeated under the same key, ``at_most_once`` for one that must never run
        twice. ``calls`` and ``optional_calls``, if either is set, replace those of the arm. ``timeout`` in seconds
        applies to callers without a deadline. The orchestrator calls the operation ``execute`` with a ``Task``; its
        return value becomes an ``ExecuteResult``. ``example`` (a body) and ``codes`` (error codes) go into the API
        description. Returns the function itself; raises ``arm_invalid``.
        """

        def declare(handler: Callable[[Any, Context[Any]], Awaitable[Any]]) -> Any:
            own_name = name if isinstance(name, str) else getattr(handler, "__name__", "")
            check_operation(self.name, own_name, kind, (declared.name for declared in self.operations))
            body, answer = resolve_types(self.name, own_name, handler)
            has_own_calls = calls is not None or optional_calls is not None
            self.operations.append(
                ArmOperation(
                    name=own_name,
                    handler=handler,
                    kind=kind,
                    body=body,
                    answer=answer,
                    summary=(inspect.getdoc(handler) or "").split("\n", 1)[0],
                    timeout=timeout,
                    calls=check_calls(self.name, calls or ()) if has_own_calls else self.required_scopes,
                    optional_calls=(
                        check_calls(self.name, optional_calls or ()) if has_own_calls else self.optional_scopes
                    ),
                    has_own_calls=has_own_calls,
                    example=example,
                    codes=codes,
                )
            )
            return handler

        if name is None or isinstance(name, str):
            return declare
        if callable(name):
            return declare(cast("Callable[[Any, Context[Any]], Awaitable[Any]]", name))
        raise ArmError(
            f"{self.name} has an operation that is not a function: write @arm.operation directly before async def."
        )


def _mark_optional(required: Sequence[Scope], optional: Sequence[Scope]) -> tuple[str, ...]:
    return (*(scope.text for scope in required), *(OPTIONAL_MARK + scope.text for scope in optional))
