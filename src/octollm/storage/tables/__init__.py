"""The tables of each service that has SQL, and nothing else.

Each service has its own ``MetaData``; no service opens another's tables. Each change needs a migration.

``MEMORY`` has documents, facts and passages, ``MONITOR`` has spans; every other table belongs to ``ORCHESTRATOR``.
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
from octollm.storage.tables.services import MEMORY, MONITOR, documents, facts, passages, passages_fts, spans
from octollm.storage.tables.tasks import (
    budgets,
    channels,
    events,
    files,
    idempotency,
    model_journal,
    relay_state,
    reservations,
    steps,
    subjects,
    task_files,
    tasks,
)

__all__ = [
    "MEMORY",
    "MONITOR",
    "ORCHESTRATOR",
    "admissions",
    "api_keys",
    "arm_instances",
    "arm_keys",
    "arms",
    "audit",
    "audit_heads",
    "budgets",
    "channels",
    "documents",
    "events",
    "facts",
    "files",
    "idempotency",
    "join_nonces",
    "joins",
    "model_journal",
    "passages",
    "passages_fts",
    "relay_state",
    "reservations",
    "revocations",
    "sessions",
    "spans",
    "steps",
    "subjects",
    "task_files",
    "tasks",
]
