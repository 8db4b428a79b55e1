"""What a task may lend: for each call of the orchestrator, a token and the grant for what may follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from octollm.capability import Declarations, Principal, RootMinter, ScopeSet, TaskRef, attenuate
from octollm.contracts.services import service_of
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.tasks.records import TaskRecord


class TaskTokenMinter:
    """Mints for tasks. ``thumbprint`` finds a service's key."""

    def __init__(
        self,
        minter: RootMinter,
        declarations: Callable[[], Declarations],
        thumbprint: Callable[[str], str | None],
    ) -> None:
        self._minter = minter
        self._declarations = declarations
        self._thumbprint = thumbprint

    def mint(
        self,
        task: TaskRecord,
        scope: str,
        authority: ScopeSet,
        deadline: Deadline,
        *,
        step: str | None = None,
        attempt: int | None = None,
        files: tuple[str, ...] = (),
    ) -> str:
        """Return a bearer string for one call of ``scope`` in the name of the task.

        ``authority`` is what the task was given and its principal still has; ``files`` are the digests that may be
        read. Raises ``authority_missing``, naming the scopes, before anything runs.
        """
        service = service_of(scope.split(":", 1)[0])
        bind: Mapping[str, tuple[str, ...]] = {"files:read": tuple(f"files:read:{digest}" for digest in files)}
        may, missing = attenuate(scope, self._declarations(), authority, bindings=bind)
        if missing:
            raise OctoError(f"The task lacks the authority for {', '.join(missing)}.", code="authority_missing")
        ref = TaskRef(task.task_id, step, attempt, task.epoch)
        left = max(1.0, deadline.remaining())
        return self._minter.mint_access(
            Principal(task.sub, task.cred, task.tenant),
            service,
            scope,
            60.0,
            task=ref,
            delegation=may,
            holder_jkt=self._thumbprint(service),
            grant_lifetime=min(left, 3600.0),
        )
