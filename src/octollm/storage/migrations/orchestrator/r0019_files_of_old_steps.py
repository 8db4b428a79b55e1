"""The files of steps that completed before attempts were stored, so that retention keeps them with their tasks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0019"
down_revision = "0018"

_INSERT = """
INSERT INTO task_files (task_id, role, step, name, digest, created_at)
SELECT DISTINCT made.task_id, 'attempt', made.step, made.digest, made.digest, made.created_at
FROM ({made}) AS made
WHERE made.digest IS NOT NULL
ON CONFLICT DO NOTHING
"""
_MADE = {
    "sqlite": """
        SELECT steps.task_id, steps.step, steps.created_at, json_extract(artifact.value, '$.digest') AS digest
        FROM steps, json_each(steps.result, '$.artifacts') AS artifact
        WHERE steps.result IS NOT NULL
    """,
    "postgresql": """
        SELECT steps.task_id, steps.step, steps.created_at, artifact.value ->> 'digest' AS digest
        FROM steps, jsonb_array_elements(steps.result -> 'artifacts') AS artifact
        WHERE jsonb_typeof(steps.result -> 'artifacts') = 'array'
    """,
}


def upgrade(op: Operations) -> None:
    """Refer to the artifacts of every step that has a result; those that are referred to stay as they are."""
    op.execute(sa.text(_INSERT.format(made=_MADE[op.get_bind().dialect.name])))
