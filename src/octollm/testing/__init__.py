"""Fakes and harnesses for those who write arms; our own tests use them too.

Nothing here is imported by the system itself. Everything here works without a network.
"""

from octollm.testing.arm_lab import Lab, arm_test, run_arm
from octollm.testing.fake_model import FakeModel, UseTool
from octollm.testing.scripted_service import Called
from octollm.testing.waiting import wait_until

__all__ = ["Called", "FakeModel", "Lab", "UseTool", "arm_test", "run_arm", "wait_until"]
