"""The API for authors of arms: Arm, Context, operations, references, messages.

An arm is a plain HTTP service with its own key. It has no credential for Redis, SQL or a provider, and reaches other
services only through its Context.
"""

from octollm.arm.arm import Arm, ArmOperation
from octollm.arm.completion import ModelCompletion
from octollm.arm.context import Artifacts, CallInfo, Context
from octollm.arm.messages import Image, Message, Tool, ToolCall
from octollm.arm.model import ModelClient, ModelEndpoint
from octollm.arm.references import OperationReference, coder, executor, judge, memory, planner, retriever
from octollm.arm.service import build_arm, open_arm

__all__ = [
    "Arm",
    "ArmOperation",
    "Artifacts",
    "CallInfo",
    "Context",
    "Image",
    "Message",
    "ModelClient",
    "ModelCompletion",
    "ModelEndpoint",
    "OperationReference",
    "Tool",
    "ToolCall",
    "build_arm",
    "coder",
    "executor",
    "judge",
    "memory",
    "open_arm",
    "planner",
    "retriever",
]
