"""Fakes and harnesses for those who write arms; our own tests use them too.

Nothing here is imported by the system itself. Everything here works without a network.
"""

from octollm.testing.waiting import wait_until

__all__ = ["wait_until"]
