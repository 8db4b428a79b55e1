"""Shell completion of models, services, arms and tasks; silent when the gateway does not answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from octollm.client import AsyncClient

T = TypeVar("T")

COMPLETION_TIMEOUT_SECONDS = 1.0
"""Upper bound of the wait after Tab."""
MAX_TASKS = 50
"""The newest tasks that are offered."""

# Imports are inside the functions: this module is loaded by every command that has an argument to complete.


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """Return the models of the catalogue whose name begins with ``incomplete``, with their titles."""
    from octollm.llm.catalogue import MODEL_CATALOGUE  # noqa: PLC0415

    return [(entry.name, entry.title) for entry in MODEL_CATALOGUE if entry.name.startswith(incomplete)]


def complete_service(incomplete: str) -> list[str]:
    """Return the built-in services whose name begins with ``incomplete``."""
    from octollm.contracts.services import SERVICES  # noqa: PLC0415

    return [name for name in SERVICES if name.startswith(incomplete)]


def complete_arm(incomplete: str) -> list[tuple[str, str]]:
    """Return the registered arms whose name begins with ``incomplete``, with their descriptions."""
    arms = _query(lambda client: client.arms()) or ()
    return [(arm.name, arm.description) for arm in arms if arm.name.startswith(incomplete)]


def complete_task(incomplete: str) -> list[tuple[str, str]]:
    """Return the newest tasks whose id begins with ``incomplete``, with their goals."""
    page = _query(lambda client: client.task_page(limit=MAX_TASKS))
    return [
        (task.task_id, " ".join(task.goal.split())[:60])
        for task in (page.tasks if page else ())
        if task.task_id.startswith(incomplete)
    ]


def _query(request: Callable[[AsyncClient], Awaitable[T]]) -> T | None:
    import asyncio  # noqa: PLC0415

    from octollm.cli.runtime import command_settings, open_client  # noqa: PLC0415
    from octollm.errors import OctoError  # noqa: PLC0415

    async def query() -> T:
        async with asyncio.timeout(COMPLETION_TIMEOUT_SECONDS), open_client(command_settings(warn=False)) as client:
            return await request(client)

    try:
        return asyncio.run(query())
    except (OctoError, TimeoutError):
        # The shell would print an error into the command line.
        return None
