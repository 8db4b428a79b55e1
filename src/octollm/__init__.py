"""OctoLLM: a team of LLM agents as secure, observable services.

Importing this package does nothing. Its submodules are the layers; what is
named here is the public API, and each name is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octollm.lazy_exports import lazy_exports

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

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "octollm.arm": (
                "Arm",
                "CallInfo",
                "Context",
                "Image",
                "Message",
                "ModelCompletion",
                "OperationReference",
                "Tool",
                "ToolCall",
                "coder",
                "executor",
                "judge",
                "memory",
                "planner",
                "retriever",
            ),
            "octollm.client": (
                "APIError",
                "AsyncClient",
                "AuthenticationError",
                "Client",
                "Conflict",
                "DeadlineExceeded",
                "InvalidRequest",
                "NotFound",
                "OutputInvalid",
                "PermissionDenied",
                "RateLimited",
                "ServerError",
                "TaskCancelled",
                "TaskFailed",
                "Unavailable",
                "connect",
                "connect_sync",
            ),
            "octollm.contracts.task": (
                "Artifact",
                "Check",
                "Citation",
                "Evidence",
                "ExecuteResult",
                "FileRef",
                "Task",
                "Usage",
            ),
            "octollm.errors": ("ArmError", "FieldError", "OctoError", "RetryStep", "StopStep"),
        },
    )
