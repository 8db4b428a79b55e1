"""Events: the durable log, its transactional outbox to Redis Pub/Sub, and subscriptions.

The log in SQL is the source of truth and Pub/Sub the fast path; a subscriber learns of every gap and reads the missing
events from the log. What an event means belongs to the layers above.
"""

from octollm.events.bus import EventBus, Gap, Subscription
from octollm.events.durable import DurableSubscription, DurableSubscriptions
from octollm.events.handlers import DeliveryPolicy, QueuedDelivery, RejectDelivery, RetryDelivery
from octollm.events.log import EventDraft, EventLog, check_position, task_subject
from octollm.events.log_tail import LogTail
from octollm.events.outbox import OutboxHealth, OutboxPolicy, OutboxPublisher
from octollm.events.pull import AckHints
from octollm.events.subscriptions import SubscriptionStore
from octollm.events.watch import Hint, TaskSubscription, TaskWatchHub

__all__ = [
    "AckHints",
    "DeliveryPolicy",
    "DurableSubscription",
    "DurableSubscriptions",
    "EventBus",
    "EventDraft",
    "EventLog",
    "Gap",
    "Hint",
    "LogTail",
    "OutboxHealth",
    "OutboxPolicy",
    "OutboxPublisher",
    "QueuedDelivery",
    "RejectDelivery",
    "RetryDelivery",
    "Subscription",
    "SubscriptionStore",
    "TaskSubscription",
    "TaskWatchHub",
    "check_position",
    "task_subject",
]
