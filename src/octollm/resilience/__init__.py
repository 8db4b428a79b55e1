"""The policies of a call as pure decisions: deadline, retry, breaker.

Values go in, a decision comes out; whoever calls does the waiting and the I/O. Nothing here imports asyncio.
"""

from octollm.resilience.breaker import Breaker, BreakerPolicy
from octollm.resilience.deadline import Deadline
from octollm.resilience.retry import Failure, Patience, RetryBudget, RetryPolicy

__all__ = ["Breaker", "BreakerPolicy", "Deadline", "Failure", "Patience", "RetryBudget", "RetryPolicy"]
