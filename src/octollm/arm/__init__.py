"""What an arm's author uses: Arm, Context, operations, streaming out.

An arm is plain HTTP plus its own key: it holds no Redis, SQL or provider credential. It knows nothing of the
services behind it except by calling them through its Context.
"""

from octollm.arm.arm import Arm, ArmOperation
from octollm.arm.artifacts import Artifacts
from octollm.arm.context import Context
from octollm.arm.model import ModelClient, ModelEndpoint
from octollm.arm.reading import ModelCompletion
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
