"""The policies of a call as pure decisions: deadline, retry, balance, ejection.

Values go in, a decision comes out; whoever calls does the waiting and the I/O. Nothing here imports asyncio.
"""

from octollm.resilience.balance import Balancer, Ejected, Instance
from octollm.resilience.deadline import Deadline
from octollm.resilience.ejection import EjectionPolicy, Outcome
from octollm.resilience.retry import Failure, Patience, RetryBudget, RetryPolicy

__all__ = [
    "Balancer",
    "Deadline",
    "Ejected",
    "EjectionPolicy",
    "Failure",
    "Instance",
    "Outcome",
    "Patience",
    "RetryBudget",
    "RetryPolicy",
]
