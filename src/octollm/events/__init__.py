"""Events: the durable log, the relay from it to Redis Pub/Sub, and those who listen.

The log in SQL is the truth and Pub/Sub is the fast path; a listener is told when it missed something. What an event
means, and what to do about it, belongs to the layers above.
"""

from octollm.events.bus import EventBus, Gap, Subscription
from octollm.events.log import EventLog, task_subject
from octollm.events.outbox import OutboxHealth, OutboxPolicy, OutboxPublisher
from octollm.events.watch import Hint, TaskSubscription, TaskWatchHub

__all__ = [
    "EventBus",
    "EventLog",
    "Gap",
    "Hint",
    "OutboxHealth",
    "OutboxPolicy",
    "OutboxPublisher",
    "Subscription",
    "TaskSubscription",
    "TaskWatchHub",
    "task_subject",
]
