"""Fakes and harnesses for authors of arms; OctoLLM's own tests use them too.

The system itself imports nothing from here. All of it works without a network.
"""

from octollm.testing.arm_client import ArmTestClient, run_arm
from octollm.testing.fake_model import FakeModel, ToolUse
from octollm.testing.scripted_service import RecordedCall
from octollm.testing.timing import ManualClock, wait_until

__all__ = ["ArmTestClient", "FakeModel", "ManualClock", "RecordedCall", "ToolUse", "run_arm", "wait_until"]
