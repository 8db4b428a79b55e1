"""What an arm's author uses: Arm, Context, operations, streaming out.

An arm is plain HTTP plus its own key: it holds no Redis, SQL or provider credential. It knows nothing of the
services behind it except by calling them through its Context.
"""

from octollm.arm.arm import Arm, ArmOperation
from octollm.arm.completion import ModelCompletion
from octollm.arm.context import Artifacts, Context
from octollm.arm.model import ModelClient, ModelEndpoint
from octollm.arm.service import build_arm

__all__ = [
    "Arm",
    "ArmOperation",
    "Artifacts",
    "Context",
    "ModelClient",
    "ModelCompletion",
    "ModelEndpoint",
    "build_arm",
]
