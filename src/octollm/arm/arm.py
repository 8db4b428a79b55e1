"""An arm: a name, what it does, what it calls, and its operations."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from octollm.contracts.services import OperationKind

ArmHandler = Callable[[Any, Any], Awaitable[Any]]


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


@dataclass(slots=True)
class Arm:
    """An arm. ``calls`` are the scopes that it calls directly; ``accepts`` tells code what it is for.

    ``accepts`` holds words such as ``files:tabular``, ``files:text`` or ``files:none``.
    """

    name: str
    description: str
    port: int
    calls: Sequence[str] = ()
    accepts: Sequence[str] = ()
    operations: list[ArmOperation] = field(default_factory=list[ArmOperation])

    def operation(
        self, name: str | None = None, *, kind: OperationKind = "repeatable", timeout: float = 600.0
    ) -> Callable[[ArmHandler], ArmHandler]:
        """Declare ``async def handler(body, ctx)`` as an operation; its name is the function's unless given.

        ``timeout`` is in seconds, for a caller that names no deadline. Raises ``TypeError`` for a function whose
        body or answer has no type.
        """

        def declare(handler: ArmHandler) -> ArmHandler:
            hints = get_type_hints(handler)
            parameters = list(inspect.signature(handler).parameters)
            if len(parameters) != 2 or parameters[0] not in hints or "return" not in hints:
                raise TypeError(f"{handler.__name__} must be `async def f(body: Type, ctx: Context) -> Type`")
            self.operations.append(
                ArmOperation(
                    name or handler.__name__,
                    handler,
                    kind,
                    hints[parameters[0]],
                    hints["return"],
                    (inspect.getdoc(handler) or "").split("\n", 1)[0],
                    timeout,
                )
            )
            return handler

        return declare
