"""The Python client of an installation: one for asyncio, and the same one for plain code.

Here live connecting, the requests of the public door with their retries, live updates that survive a broken
connection, and failures as types. It uses the public API and nothing else: no service, no storage, no setting
but where the door is and the key to it.
"""

from octollm.client.async_client import AsyncClient
from octollm.client.errors import (
    APIError,
    AuthenticationError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerError,
    TaskCancelled,
    TaskFailed,
    Unavailable,
)
from octollm.client.streams import Update
from octollm.client.sync_client import Client, TaskHandle, connect, connect_sync
from octollm.client.task import AsyncTaskHandle

__all__ = [  # noqa: RUF022  grouped by what they are for
    # Connecting
    "AsyncClient",
    "Client",
    "connect",
    "connect_sync",
    # Tasks
    "TaskHandle",
    "AsyncTaskHandle",
    "Update",
    # Failures of a request
    "AuthenticationError",
    "Conflict",
    "DeadlineExceeded",
    "APIError",
    "InvalidRequest",
    "NotFound",
    "PermissionDenied",
    "RateLimited",
    "ServerError",
    "Unavailable",
    # Failures of a task
    "TaskCancelled",
    "TaskFailed",
]
