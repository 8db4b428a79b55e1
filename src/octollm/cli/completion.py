"""Shell completion of models, services, arms and tasks; silent when the gateway does not answer."""

from __future__ import annotations

from typing import TypeVar

_T = TypeVar("_T")

COMPLETION_TIMEOUT_SECONDS = 1.0
"""How long somebody who pressed Tab waits at most."""
MAX_TASKS = 50


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """Return the catalogue's models that begin so."""
    from octollm.llm.catalogue import MODEL_CATALOGUE  # noqa: PLC0415  Tab should cost nothing elsewhere

    return [(entry.name, entry.title) for entry in MODEL_CATALOGUE if entry.name.startswith(incomplete)]


def complete_service(incomplete: str) -> list[str]:
    """Return the built-in services that begin so."""
    from octollm.contracts.services import SERVICES  # noqa: PLC0415  as above

    return [name for name in SERVICES if name.startswith(incomplete)]


def complete_arm(incomplete: str) -> list[tuple[str, str]]:
    """Return the registered arms that begin so."""
    from octollm.contracts.enrolment import ArmList  # noqa: PLC0415  as above

    found = _fetch("/arms", ArmList)
    return [(arm.name, arm.description) for arm in found.arms if arm.name.startswith(incomplete)] if found else []


def complete_task(incomplete: str) -> list[tuple[str, str]]:
    """Return the newest tasks that begin so, with their goals."""
    from octollm.contracts.api import TaskList  # noqa: PLC0415  as above

    found = _fetch(f"/tasks?limit={MAX_TASKS}", TaskList)
    if found is None:
        return []
    return [
        (task.task_id, " ".join(task.goal.split())[:60]) for task in found.tasks if task.task_id.startswith(incomplete)
    ]


def _fetch(path: str, kind: type[_T]) -> _T | None:
    import asyncio  # noqa: PLC0415  as above

    from octollm.cli.runtime import (
        command_settings,
        open_transport,
    )
    from octollm.errors import OctoError  # noqa: PLC0415  as above

    async def ask() -> _T:
        async with asyncio.timeout(COMPLETION_TIMEOUT_SECONDS), open_transport(command_settings(warn=False)) as door:
            return await door.get(path, kind)

    try:
        return asyncio.run(ask())
    except (OctoError, TimeoutError):
        # A shell that completes has no place for an error.
        return None
