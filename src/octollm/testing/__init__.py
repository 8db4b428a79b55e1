"""Fakes and harnesses for those who write arms; our own tests use them too.

Nothing here is imported by the system itself. Everything here works without a network.
"""

from octollm.testing.arm_harness import ArmHarness, arm_test, run_arm
from octollm.testing.fake_model import FakeModel, ToolUse
from octollm.testing.polling import wait_until
from octollm.testing.scripted_service import RecordedCall

__all__ = ["ArmHarness", "FakeModel", "RecordedCall", "ToolUse", "arm_test", "run_arm", "wait_until"]
