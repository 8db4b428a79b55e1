"""The policies of a call as pure decisions: deadline, retry, balance, ejection.

Values go in, a decision comes out; whoever calls does the waiting and the I/O. Nothing here imports asyncio.
"""

from octollm.resilience.balance import Balancer, Ejection, Instance
from octollm.resilience.deadline import Deadline
from octollm.resilience.ejection import CallOutcome, EjectionPolicy
from octollm.resilience.retry import CallFailure, OutageRetry, RetryBudget, RetryPolicy

__all__ = [
    "Balancer",
    "CallFailure",
    "CallOutcome",
    "Deadline",
    "Ejection",
    "EjectionPolicy",
    "Instance",
    "OutageRetry",
    "RetryBudget",
    "RetryPolicy",
]
