"""The tables of each service that has SQL, and nothing else.

Each service has its own ``MetaData``; no service opens another's tables. Each change needs a migration.

``MEMORY`` has documents, passages, facts and sources, ``MONITOR`` has spans; every other table belongs to
``ORCHESTRATOR``.
Times are epoch seconds (UTC), money is US dollars, ids are text. JSON columns accept msgspec Structs and return plain
Python values.
"""

from octollm.storage.tables.access import (
    admissions,
    api_keys,
    arm_instances,
    arm_keys,
    arms,
    audit,
    audit_heads,
    join_nonces,
    joins,
    revocations,
    sessions,
)
from octollm.storage.tables.columns import ORCHESTRATOR
from octollm.storage.tables.services import (
    MEMORY,
    MONITOR,
    document_sources,
    documents,
    fact_sources,
    fact_versions,
    passage_terms,
    passage_vocabulary,
    passages,
    spans,
)
from octollm.storage.tables.subscriptions import (
    dead_letters,
    delayed_subjects,
    subscription_consumers,
    subscription_partitions,
    subscriptions,
)
from octollm.storage.tables.tasks import (
    approvals,
    attempts,
    budgets,
    channels,
    events,
    files,
    idempotency,
    memory_erasures,
    model_journal,
    relay_state,
    reservations,
    steps,
    subjects,
    task_files,
    tasks,
)
from octollm.storage.tables.webhooks import (
    hook_receipts,
    hooks,
    schedule_runs,
    schedules,
    webhook_deliveries,
    webhook_feed,
    webhooks,
)

__all__ = [
    "MEMORY",
    "MONITOR",
    "ORCHESTRATOR",
    "admissions",
    "api_keys",
    "approvals",
    "arm_instances",
    "arm_keys",
    "arms",
    "attempts",
    "audit",
    "audit_heads",
    "budgets",
    "channels",
    "dead_letters",
    "delayed_subjects",
    "document_sources",
    "documents",
    "events",
    "fact_sources",
    "fact_versions",
    "files",
    "hook_receipts",
    "hooks",
    "idempotency",
    "join_nonces",
    "joins",
    "memory_erasures",
    "model_journal",
    "passage_terms",
    "passage_vocabulary",
    "passages",
    "relay_state",
    "reservations",
    "revocations",
    "schedule_runs",
    "schedules",
    "sessions",
    "spans",
    "steps",
    "subjects",
    "subscription_consumers",
    "subscription_partitions",
    "subscriptions",
    "task_files",
    "tasks",
    "webhook_deliveries",
    "webhook_feed",
    "webhooks",
]
