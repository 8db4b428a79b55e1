"""The policies of a call as pure decisions: deadline, retry, load balancing, ejection.

Values go in, a decision comes out; the caller does the waiting and the I/O. Nothing here imports asyncio.
"""

from octollm.resilience.load_balancing import Balancer, CallOutcome, Ejection, EjectionPolicy, Instance, Recovery
from octollm.resilience.retry import (
    Backoff,
    CallFailure,
    Deadline,
    OutageRetry,
    RetryBudget,
    RetryPolicy,
    retry_until,
)

__all__ = [
    "Backoff",
    "Balancer",
    "CallFailure",
    "CallOutcome",
    "Deadline",
    "Ejection",
    "EjectionPolicy",
    "Instance",
    "OutageRetry",
    "Recovery",
    "RetryBudget",
    "RetryPolicy",
    "retry_until",
]
