"""OctoLLM: a team of LLM agents as secure, observable services.

Importing this package does nothing. Its submodules are the layers; what is
named here is the public API, and each name is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octollm.arm import (
        Arm,
        CallInfo,
        Context,
        Image,
        Message,
        ModelCompletion,
        OperationReference,
        Tool,
        ToolCall,
        coder,
        executor,
        judge,
        memory,
        planner,
        retriever,
    )
    from octollm.client import (
        APIError,
        AsyncClient,
        AuthenticationError,
        Client,
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
        connect,
        connect_sync,
    )
    from octollm.contracts.task import Artifact, Check, Citation, Evidence, ExecuteResult, FileRef, Task, Usage
    from octollm.errors import ArmError, FieldError, OctoError, RetryStep, StopStep

__all__ = [  # noqa: RUF022  (grouped by what they are for)
    # Writing an arm
    "Arm",
    "CallInfo",
    "Context",
    "OperationReference",
    "Task",
    # Operations of the built-in services, for calls and ctx.call
    "coder",
    "executor",
    "judge",
    "memory",
    "planner",
    "retriever",
    # What an arm says to a model
    "Image",
    "Message",
    "ModelCompletion",
    "Tool",
    "ToolCall",
    # Files and results of a task
    "Artifact",
    "Check",
    "Citation",
    "Evidence",
    "ExecuteResult",
    "FileRef",
    "Usage",
    # A client of an installation
    "AsyncClient",
    "Client",
    "connect",
    "connect_sync",
    # Errors
    "ArmError",
    "FieldError",
    "OctoError",
    "RetryStep",
    "StopStep",
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
    "OutputInvalid",
    "TaskCancelled",
    "TaskFailed",
    # This package
    "__version__",
]

__version__ = "0.1.0"

_PLACES = {
    "Arm": ("octollm.arm", "Arm"),
    "ArmError": ("octollm.errors", "ArmError"),
    "Artifact": ("octollm.contracts.task", "Artifact"),
    "CallInfo": ("octollm.arm", "CallInfo"),
    "Check": ("octollm.contracts.task", "Check"),
    "Citation": ("octollm.contracts.task", "Citation"),
    "Context": ("octollm.arm", "Context"),
    "Evidence": ("octollm.contracts.task", "Evidence"),
    "ExecuteResult": ("octollm.contracts.task", "ExecuteResult"),
    "FieldError": ("octollm.errors", "FieldError"),
    "FileRef": ("octollm.contracts.task", "FileRef"),
    "Image": ("octollm.arm", "Image"),
    "Message": ("octollm.arm", "Message"),
    "ModelCompletion": ("octollm.arm", "ModelCompletion"),
    "OctoError": ("octollm.errors", "OctoError"),
    "OperationReference": ("octollm.arm", "OperationReference"),
    "RetryStep": ("octollm.errors", "RetryStep"),
    "StopStep": ("octollm.errors", "StopStep"),
    "Task": ("octollm.contracts.task", "Task"),
    "Tool": ("octollm.arm", "Tool"),
    "ToolCall": ("octollm.arm", "ToolCall"),
    "Usage": ("octollm.contracts.task", "Usage"),
    "coder": ("octollm.arm", "coder"),
    "connect": ("octollm.client", "connect"),
    "connect_sync": ("octollm.client", "connect_sync"),
    "executor": ("octollm.arm", "executor"),
    "judge": ("octollm.arm", "judge"),
    "memory": ("octollm.arm", "memory"),
    "planner": ("octollm.arm", "planner"),
    "retriever": ("octollm.arm", "retriever"),
    "APIError": ("octollm.client", "APIError"),
    "AuthenticationError": ("octollm.client", "AuthenticationError"),
    "Conflict": ("octollm.client", "Conflict"),
    "DeadlineExceeded": ("octollm.client", "DeadlineExceeded"),
    "InvalidRequest": ("octollm.client", "InvalidRequest"),
    "NotFound": ("octollm.client", "NotFound"),
    "OutputInvalid": ("octollm.client", "OutputInvalid"),
    "PermissionDenied": ("octollm.client", "PermissionDenied"),
    "RateLimited": ("octollm.client", "RateLimited"),
    "ServerError": ("octollm.client", "ServerError"),
    "TaskCancelled": ("octollm.client", "TaskCancelled"),
    "TaskFailed": ("octollm.client", "TaskFailed"),
    "Unavailable": ("octollm.client", "Unavailable"),
    "AsyncClient": ("octollm.client", "AsyncClient"),
    "Client": ("octollm.client", "Client"),
}
"""Where each public name lives: a module, and what the name is called there."""


def __getattr__(name: str) -> object:
    """Fetch a public name (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'octollm' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
    module, inner = _PLACES[name]
    return getattr(import_module(module), inner)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
