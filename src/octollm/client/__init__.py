"""The Python client of an installation: ``AsyncClient`` for asyncio, ``Client`` for synchronous code.

It has the requests of the public API with their retries, live updates that resume after a disconnect, typed results,
and errors as types. It uses the public API and nothing else: no service, no storage, and of the settings only the
gateway's address, the API key and TLS.
"""

from octollm.client.admin import AsyncAdmin
from octollm.client.async_client import AsyncClient, connect
from octollm.client.errors import (
    APIError,
    AuthenticationError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    OutputInvalid,
    PermissionDenied,
    RateLimited,
    ServerError,
    TaskCancelled,
    TaskFailed,
    Unavailable,
)
from octollm.client.memory import AsyncMemory
from octollm.client.schedules import AsyncSchedules
from octollm.client.streams import Update
from octollm.client.subscriptions import AsyncSubscriptions
from octollm.client.sync_client import Admin, Client, Memory, Schedules, Subscriptions, TaskHandle, connect_sync
from octollm.client.task import AsyncTaskHandle, TaskResult

__all__ = [  # noqa: RUF022  grouped by what they are for
    # Connecting
    "AsyncClient",
    "Client",
    "connect",
    "connect_sync",
    # Administration
    "AsyncAdmin",
    "Admin",
    # Durable subscriptions
    "AsyncSubscriptions",
    "Subscriptions",
    # Memory
    "AsyncMemory",
    "Memory",
    # Schedules
    "AsyncSchedules",
    "Schedules",
    # Tasks
    "AsyncTaskHandle",
    "TaskHandle",
    "TaskResult",
    "Update",
    # Errors of a request
    "APIError",
    "AuthenticationError",
    "Conflict",
    "DeadlineExceeded",
    "InvalidRequest",
    "NotFound",
    "PermissionDenied",
    "RateLimited",
    "ServerError",
    "Unavailable",
    # Errors of a task
    "OutputInvalid",
    "TaskCancelled",
    "TaskFailed",
]
