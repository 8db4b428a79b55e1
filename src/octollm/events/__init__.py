"""Events: the durable log, its transactional outbox to Redis Pub/Sub, and subscriptions.

The log in SQL is the source of truth and Pub/Sub the fast path; a subscriber learns of every gap and reads the missing
events from the log. What an event means belongs to the layers above.
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
