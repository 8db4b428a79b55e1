"""Events: the durable log, its transactional outbox to Redis Pub/Sub, and subscriptions.

The log in SQL is the source of truth and Pub/Sub the fast path; a subscriber learns of every gap and reads the missing
events from the log. What an event means belongs to the layers above.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octollm.lazy_exports import lazy_exports

if TYPE_CHECKING:
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

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "octollm.events.bus": ("EventBus", "Gap", "Subscription"),
            "octollm.events.durable": ("DurableSubscription", "DurableSubscriptions"),
            "octollm.events.handlers": ("DeliveryPolicy", "QueuedDelivery", "RejectDelivery", "RetryDelivery"),
            "octollm.events.log": ("EventDraft", "EventLog", "check_position", "task_subject"),
            "octollm.events.log_tail": ("LogTail",),
            "octollm.events.outbox": ("OutboxHealth", "OutboxPolicy", "OutboxPublisher"),
            "octollm.events.pull": ("AckHints",),
            "octollm.events.subscriptions": ("SubscriptionStore",),
            "octollm.events.watch": ("Hint", "TaskSubscription", "TaskWatchHub"),
        },
    )
