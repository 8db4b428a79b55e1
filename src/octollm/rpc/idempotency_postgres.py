"""Claims and completions on PostgreSQL: one statement with arrays, handed to the driver as it is.

Of a statement that many calls share, what a query builder adds is the larger part; here it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octollm.rpc.idempotency import LEASE_SECONDS, ClaimCompletion, IdempotencyKey, NewClaim
from octollm.storage import DirectPool

_MOMENT_SQL = "(SELECT extract(epoch FROM clock_timestamp())::double precision AS now) AS moment"
_CLAIM_SQL = f"""
INSERT INTO idempotency
    (tenant, subject, service, operation, key, body_digest, task_id, state, holder, fence, lease_until, created_at)
SELECT of.tenant, of.subject, of.service, of.operation, of.key, of.body_digest, of.task_id,
    'claimed', $8, 1, moment.now + $9, moment.now
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
    AS of(tenant, subject, service, operation, key, body_digest, task_id), {_MOMENT_SQL}
ON CONFLICT DO NOTHING
RETURNING tenant, subject, service, operation, key
"""  # noqa: S608  nothing of a call is in it
_COMPLETE_SQL = f"""
UPDATE idempotency AS mine
SET state = 'completed', status = of.status, answer = of.answer, headers = of.headers::jsonb, completed_at = moment.now
FROM unnest(
        $1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::int[], $8::bytea[], $9::text[]
    ) AS of(tenant, subject, service, operation, key, run, status, answer, headers), {_MOMENT_SQL}
WHERE mine.tenant = of.tenant AND mine.subject = of.subject AND mine.service = of.service
    AND mine.operation = of.operation AND mine.key = of.key AND mine.fence = of.run
"""  # noqa: S608


async def claim_new(direct: DirectPool, claims: Sequence[NewClaim], holder: str) -> set[IdempotencyKey]:
    """Claim the keys that nobody has; return them."""
    rows = await direct.fetch(
        _CLAIM_SQL,
        *_key_arrays([claim.key for claim in claims]),
        [claim.body_digest for claim in claims],
        [claim.task_id for claim in claims],
        holder,
        LEASE_SECONDS,
    )
    return {IdempotencyKey(*map(str, row)) for row in rows}


async def complete_all(direct: DirectPool, completions: Sequence[ClaimCompletion]) -> None:
    """Store the answers of claims whose run is still theirs."""
    await direct.fetch(
        _COMPLETE_SQL,
        *_key_arrays([each.key for each in completions]),
        [each.epoch for each in completions],
        [each.response.status for each in completions],
        [each.response.body for each in completions],
        [msgspec.json.encode(each.response.headers).decode() for each in completions],
    )


def _key_arrays(keys: Sequence[IdempotencyKey]) -> tuple[list[str], ...]:
    return (
        [key.tenant for key in keys],
        [key.subject for key in keys],
        [key.service for key in keys],
        [key.operation for key in keys],
        [key.key for key in keys],
    )
