"""Idempotency keys in the service's own SQL, claimed and completed by group commit.

On PostgreSQL a batch is one statement over arrays, passed straight to the driver; elsewhere it goes through SQLAlchemy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, and_, bindparam, delete, func, select, tuple_, update

from octollm.errors import OctoError
from octollm.group_commit import GroupCommit
from octollm.rpc.idempotency import (
    LEASE_SECONDS,
    MAX_STORED_BYTES,
    RETENTION_SECONDS,
    AlreadyCompleted,
    CancellableClaims,
    ClaimCompletion,
    ClaimOutcome,
    HeldClaim,
    IdempotencyKey,
    InFlight,
    KeyConflict,
    NewClaim,
    OutcomeUnknown,
    StoredResponse,
)
from octollm.storage import Database, DirectPool, Transaction, is_lease_over, row_to_dict
from octollm.storage.programs import SqlStatement, update_statement
from octollm.storage.tables import idempotency as table
from octollm.storage.tables import tasks

PRUNE_BATCH = 1000
"""Expired keys that are deleted at a time."""
PRUNE_EVERY = 500
"""Claims between two deletions: more keys are deleted than added, so that the table holds about a day's calls."""
_NAMES = ("tenant", "subject", "service", "operation", "key")
_COLUMNS = tuple(table.c[name] for name in _NAMES)
_READ_HEADERS = """
SELECT headers FROM idempotency
WHERE tenant = $1 AND subject = $2 AND service = $3 AND operation = $4 AND key = $5
"""
_RECORD_EFFECT = update_statement("idempotency", ("headers",), _NAMES)
_KEY_MATCHES = and_(*(column == bindparam(f"of_{column.name}") for column in _COLUMNS))


class SqlIdempotencyStore:
    """The claims and responses of every service that uses this database."""

    def __init__(self, db: Database, holder: str) -> None:
        self._db = db
        self._holder = holder
        self._claims: GroupCommit[NewClaim, ClaimOutcome] = GroupCommit(self._claim_all, name="idempotency claims")
        self._completions: GroupCommit[ClaimCompletion, None] = GroupCommit(
            self._complete_all, name="idempotency completions"
        )
        self._claiming = CancellableClaims(self._claims, self.release)
        self._until_prune = 0

    async def claim(self, key: IdempotencyKey, body_digest: str, *, idempotent: bool, bearer: str) -> ClaimOutcome:
        """Claim the key, or return its state."""
        del bearer  # the caller was authorized before
        return await self._claiming.claim(NewClaim(key, body_digest, idempotent), key)

    async def claim_many(self, claims: Sequence[NewClaim]) -> list[ClaimOutcome | OctoError]:
        """Claim several keys, and return their outcomes in order.

        The outcome of a claim for an older epoch of its task is ``fence_lost``.
        """
        return await self._claiming.claim_many([(claim, claim.key) for claim in claims])

    async def _claim_all(self, claims: Sequence[NewClaim]) -> Sequence[ClaimOutcome | OctoError]:
        # Of equal keys in one batch the first is inserted; the others then find a key that is in flight.
        first: dict[IdempotencyKey, NewClaim] = {}
        for claim in claims:
            first.setdefault(claim.key, claim)
        fresh = await self._insert([first[key] for key in sorted(first)])
        outcomes: dict[int, ClaimOutcome | OctoError] = {
            id(claim): HeldClaim(fresh[claim.key]) for claim in first.values() if claim.key in fresh
        }
        rest = sorted((claim for claim in claims if id(claim) not in outcomes), key=lambda claim: claim.key)
        # The claims above are committed: a failure from here on must not fail their callers.
        try:
            outcomes |= await self._resolve_all(rest)
        except OctoError as error:
            outcomes |= {id(claim): error for claim in rest}
        with contextlib.suppress(OctoError):
            await self._prune(len(claims))
        return [outcomes[id(claim)] for claim in claims]

    async def _resolve_all(self, claims: Sequence[NewClaim]) -> dict[int, ClaimOutcome | OctoError]:
        if not claims:
            return {}
        outcomes: dict[int, ClaimOutcome | OctoError] = {}
        async with self._db.transaction() as tx:
            stale = await _find_stale(tx, claims)
            for claim in claims:
                outcomes[id(claim)] = _fence_lost() if claim in stale else await self._resolve_existing(tx, claim)
        return outcomes

    async def _insert(self, claims: Sequence[NewClaim]) -> dict[IdempotencyKey, int]:
        """Claim the keys that are free and return them, each with its fence."""
        pool = self._pool_for(claims)
        if pool is not None:
            return await claim_new(pool, claims, self._holder)
        async with self._db.transaction() as tx:
            stale = await _find_stale(tx, claims)
            if len(stale) == len(claims):
                return {}
            now = tx.clock.now()
            statement = (
                tx.insert(table)
                .values(
                    state="claimed",
                    holder=self._holder,
                    fence=_first_epoch(now),
                    lease_until=now + LEASE_SECONDS,
                    created_at=now,
                )
                .on_conflict_do_nothing()
                .returning(*_COLUMNS, table.c.fence)
            )
            rows = [
                {**_key_columns(claim.key), "body_digest": claim.body_digest, "task_id": claim.task_id}
                for claim in claims
                if claim not in stale
            ]
            done = await tx.execute(statement, rows)
            return {IdempotencyKey(*map(str, row[:-1])): int(row[-1]) for row in done.all()}

    async def _resolve_existing(self, tx: Transaction, claim: NewClaim) -> ClaimOutcome:
        """Return the state of a claimed key; take the claim over when its lease has expired."""
        # The row lock lets one process alone take over a claim whose lease has expired.
        row = await tx.first(select(table).where(_key_is(claim.key)).with_for_update())
        if row is None:
            return InFlight()  # released meanwhile: the next poll finds the key free
        now = await tx.now()
        outcome = _decide(row_to_dict(row), claim.body_digest, now, idempotent=claim.idempotent)
        values: dict[str, object] = {}
        if isinstance(outcome, HeldClaim):
            # The higher fence makes a completion by the former holder a no-op.
            values = {
                "state": "claimed",
                "holder": self._holder,
                "fence": outcome.epoch,
                "lease_until": now + LEASE_SECONDS,
            }
        elif isinstance(outcome, OutcomeUnknown):
            values = {"state": "unknown"}
        if values:
            await tx.execute(update(table).where(_key_is(claim.key)).values(values))
        return outcome

    async def find_effect(self, key: IdempotencyKey | None) -> str | None:
        """Return the effect recorded by an earlier holder that died before its response was stored."""
        if key is None:
            return None
        rows = await self._db.fetch(_READ_HEADERS, *(getattr(key, name) for name in _NAMES))
        headers = rows[0]["headers"] if rows else None
        return None if headers is None else msgspec.json.decode(headers).get("done")

    async def record_effect(self, tx: Transaction, key: IdempotencyKey | None, effect: str) -> None:
        """Record the effect in the transaction that has it, so that no later holder repeats the work.

        Without it, a call that was cut off between its effect and its response would answer its repeat with a refusal:
        the task is cancelled already, the credential is gone. A call without a key records nothing.
        """
        if key is None:
            return
        await tx.execute(update(table).where(_key_is(key)).values(headers={"done": effect}))

    def effect_statements(self, key: IdempotencyKey | None, effect: str) -> tuple[SqlStatement, ...]:
        """Return the write of :meth:`record_effect`, for a program."""
        if key is None:
            return ()
        done = msgspec.json.encode({"done": effect}).decode()
        return (SqlStatement(_RECORD_EFFECT, (done, *(getattr(key, name) for name in _NAMES))),)

    async def renew(self, claims: Sequence[tuple[IdempotencyKey, int]]) -> None:
        """Renew the leases of claims."""
        if not claims:
            return
        async with self._db.transaction(single=True) as tx:
            statement = (
                update(table)
                .where(_KEY_MATCHES, table.c.fence == bindparam("of_epoch"), table.c.state == "claimed")
                .values(lease_until=_now(tx) + LEASE_SECONDS)
            )
            # Sorted, as every statement on several keys: one order of row locks prevents deadlocks.
            await tx.execute(statement, [{**_key_parameters(key), "of_epoch": epoch} for key, epoch in sorted(claims)])

    def _pool_for(self, items: Sequence[NewClaim] | Sequence[ClaimCompletion]) -> DirectPool | None:
        """Return the pool that commits a batch; those of idempotent calls alone do not wait for the disk.

        A crash of the database server may take their last commits along, and then a repeated call runs again, as an
        idempotent operation may after an interruption. No effect happens twice for that: a server flushes its log in
        order, so an at-most-once claim, a step or a settled budget is never on the disk without the responses that
        its caller had seen before.
        """
        return self._db.lazy_pool if all(item.idempotent for item in items) else self._db.direct_pool

    async def complete(
        self, key: IdempotencyKey, epoch: int, response: StoredResponse, *, idempotent: bool = False
    ) -> None:
        """Store the response of a claimed call; that of a former holder is ignored."""
        if len(response.body) > MAX_STORED_BYTES:
            await self.release(key, epoch)
            return
        await self._completions.wait(ClaimCompletion(key, epoch, response, idempotent))

    async def complete_many(self, completions: Sequence[ClaimCompletion]) -> None:
        """Store the responses of several claimed calls, as :meth:`complete` does."""
        for each in completions:
            if len(each.response.body) > MAX_STORED_BYTES:
                await self.release(each.key, each.epoch)
        waiting = [self._completions.put(each) for each in completions if len(each.response.body) <= MAX_STORED_BYTES]
        if waiting:
            # Unlike gather, wait leaves the completions alone when it is cancelled.
            await asyncio.wait(waiting)
            for completion in waiting:
                completion.result()

    async def _complete_all(self, completions: Sequence[ClaimCompletion]) -> Sequence[None]:
        ordered = sorted(completions, key=lambda each: each.key)
        pool = self._pool_for(ordered)
        if pool is not None:
            await complete_all(pool, ordered)
            return [None] * len(completions)
        async with self._db.transaction() as tx:
            statement = (
                update(table)
                .where(_KEY_MATCHES, table.c.fence == bindparam("of_epoch"))
                .values(
                    state="completed",
                    status=bindparam("new_status"),
                    answer=bindparam("new_answer"),
                    headers=bindparam("new_headers"),
                    completed_at=tx.clock.now(),
                )
            )
            rows = [
                {
                    **_key_parameters(each.key),
                    "of_epoch": each.epoch,
                    "new_status": each.response.status,
                    "new_answer": each.response.body,
                    "new_headers": dict(each.response.headers),
                }
                for each in ordered
            ]
            await tx.execute(statement, rows)
        return [None] * len(completions)

    async def release(self, key: IdempotencyKey, epoch: int) -> None:
        """Release a claim whose call did not run."""
        async with self._db.transaction(single=True) as tx:
            await tx.execute(delete(table).where(_key_is(key), table.c.fence == epoch, table.c.state == "claimed"))

    async def _prune(self, claimed: int) -> None:
        """Delete keys older than a day, except those that another process is deleting."""
        self._until_prune -= claimed
        if self._until_prune > 0:
            return
        # A full batch leaves more to delete: the next claims go on with it.
        self._until_prune = 0 if await delete_expired_keys(self._db) >= PRUNE_BATCH else PRUNE_EVERY


async def delete_expired_keys(db: Database) -> int:
    """Delete up to :data:`PRUNE_BATCH` keys older than a day with their responses, and return how many."""
    async with db.transaction() as tx:
        before = await tx.now() - RETENTION_SECONDS
        old = select(*_COLUMNS).where(table.c.created_at < before).limit(PRUNE_BATCH)
        done = await tx.execute(delete(table).where(tuple_(*_COLUMNS).in_(old.with_for_update(skip_locked=True))))
    return done.rowcount


def _first_epoch(now: float) -> int:
    """Return the fence of a new row: milliseconds, so that a key claimed anew never gets the fence of a lost claim."""
    return int(now * 1000)


def _fence_lost() -> OctoError:
    return OctoError("A newer run holds the task.", code="fence_lost")


async def _find_stale(tx: Transaction, claims: Sequence[NewClaim]) -> set[NewClaim]:
    """Return the claims of workers that lost their task: a newer epoch holds it."""
    fenced = {claim.task_id for claim in claims if claim.epoch is not None}
    if not fenced:
        return set()
    rows = await tx.all(select(tasks.c.task_id, tasks.c.run).where(tasks.c.task_id.in_(fenced)))
    epochs = {row["task_id"]: int(row["run"]) for row in rows}
    return {claim for claim in claims if claim.epoch is not None and claim.epoch < epochs.get(claim.task_id, 0)}


def _now(tx: Transaction) -> Any:
    """Return the time of a statement, as SQL where the server's clock counts: that saves a query."""
    return func.extract("epoch", func.clock_timestamp()) if tx.dialect == "postgresql" else tx.clock.now()


def _key_columns(key: IdempotencyKey) -> dict[str, object]:
    return {name: getattr(key, name) for name in _NAMES}


def _key_parameters(key: IdempotencyKey) -> dict[str, object]:
    return {f"of_{name}": getattr(key, name) for name in _NAMES}


def _decide(row: Mapping[str, Any], body_digest: str, now: float, *, idempotent: bool) -> ClaimOutcome:
    # First of all: another body is a conflict, whatever became of the call with this key.
    if row["body_digest"] != body_digest:
        return KeyConflict()
    if row["state"] == "completed":
        return AlreadyCompleted(StoredResponse(row["status"], row["answer"], row["headers"] or {}))
    if row["state"] == "unknown":
        return OutcomeUnknown()
    if not is_lease_over(float(row["lease_until"]), now, LEASE_SECONDS):
        return InFlight()
    # The holder is gone. Only an operation that may run again runs again.
    return HeldClaim(row["fence"] + 1) if idempotent else OutcomeUnknown()


def _key_is(key: IdempotencyKey) -> ColumnElement[bool]:
    return and_(*(column == getattr(key, column.name) for column in _COLUMNS))


_MOMENT_SQL = "(SELECT extract(epoch FROM clock_timestamp())::double precision AS now) AS moment"
_CLAIM_SQL = f"""
INSERT INTO idempotency
    (tenant, subject, service, operation, key, body_digest, task_id, state, holder, fence, lease_until, created_at)
SELECT of.tenant, of.subject, of.service, of.operation, of.key, of.body_digest, of.task_id,
    'claimed', $8, floor(moment.now * 1000)::bigint, moment.now + $9, moment.now
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $10::bigint[])
    AS of(tenant, subject, service, operation, key, body_digest, task_id, run), {_MOMENT_SQL}
WHERE NOT EXISTS (SELECT FROM tasks WHERE tasks.task_id = of.task_id AND tasks.run > of.run)
ON CONFLICT DO NOTHING
RETURNING tenant, subject, service, operation, key, fence
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


async def claim_new(direct: DirectPool, claims: Sequence[NewClaim], holder: str) -> dict[IdempotencyKey, int]:
    """Claim the keys that are free, and return them with their epochs; an older epoch of a task claims none.

    The fence is checked by the statement that claims: a query of its own would cost as much as the claim.
    """
    rows = await direct.fetch(
        _CLAIM_SQL,
        *_key_arrays([claim.key for claim in claims]),
        [claim.body_digest for claim in claims],
        [claim.task_id for claim in claims],
        holder,
        LEASE_SECONDS,
        [claim.epoch for claim in claims],
    )
    return {IdempotencyKey(*map(str, row[:-1])): int(str(row[-1])) for row in rows}


async def complete_all(direct: DirectPool, completions: Sequence[ClaimCompletion]) -> None:
    """Store the responses of claims whose fence still matches."""
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
