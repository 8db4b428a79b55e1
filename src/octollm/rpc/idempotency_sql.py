"""Keys kept in the service's own SQL: what comes at about the same time is claimed, and completed, together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, delete, func, select, tuple_, update

from octollm.errors import OctoError
from octollm.rpc.batches import Batches
from octollm.rpc.claiming import Claiming
from octollm.rpc.idempotency import (
    KEEP_SECONDS,
    LEASE_SECONDS,
    Claimed,
    Completion,
    Conflict,
    InFlight,
    Kept,
    KeyOf,
    NewClaim,
    Outcome,
    Stored,
    Unknown,
)
from octollm.rpc.idempotency_postgres import claim_new, complete_all
from octollm.storage import Database, Transaction, plain
from octollm.storage.tables import idempotency as table

MAX_ANSWER = 1024 * 1024
"""Bytes of an answer that is kept; a call with a larger one is done again when repeated."""
PRUNE = 1000
"""Old keys that are dropped at a time."""
PRUNE_EVERY = 500
"""Claims after which old keys are looked for: more are dropped than come, so that a day's calls bound the table."""
_NAMES = ("tenant", "subject", "service", "operation", "key")
_COLUMNS = tuple(table.c[name] for name in _NAMES)
_MINE = and_(*(column == bindparam(f"of_{column.name}") for column in _COLUMNS))


class SqlIdempotency:
    """Claims and answers of all services that keep theirs here."""

    def __init__(self, db: Database, holder: str) -> None:
        self._db = db
        self._holder = holder
        self._claims: Batches[NewClaim, Outcome] = Batches(self._claim_all, name="idempotency claims")
        self._completions: Batches[Completion, None] = Batches(self._complete_all, name="idempotency completions")
        self._claiming = Claiming(self._claims, self.release)
        self._until_prune = 0

    async def claim(self, key: KeyOf, body_digest: str, *, repeatable: bool, bearer: str) -> Outcome:
        """Take the key, or say what stands in the way."""
        del bearer  # the caller was authorised before the key is looked up
        return await self.claim_for(key, body_digest, repeatable=repeatable, task_id=None)

    async def claim_for(self, key: KeyOf, body_digest: str, *, repeatable: bool, task_id: str | None) -> Outcome:
        """Take the key for work on a task."""
        return await self._claiming.claim(NewClaim(key, body_digest, repeatable, task_id), key)

    async def _claim_all(self, claims: Sequence[NewClaim]) -> Sequence[Outcome | OctoError]:
        first: dict[KeyOf, NewClaim] = {}
        for claim in claims:
            first.setdefault(claim.key, claim)
        fresh = await self._insert([first[key] for key in sorted(first)])
        outcomes: dict[int, Outcome | OctoError] = {
            id(claim): Claimed(1) for claim in first.values() if claim.key in fresh
        }
        rest = sorted((claim for claim in claims if id(claim) not in outcomes), key=lambda claim: claim.key)
        # From here on there are claims that were made: what fails must not take them along.
        try:
            outcomes |= await self._look_all(rest)
        except OctoError as error:
            outcomes |= {id(claim): error for claim in rest}
        with contextlib.suppress(OctoError):
            await self._prune(len(claims))
        return [outcomes[id(claim)] for claim in claims]

    async def _look_all(self, claims: Sequence[NewClaim]) -> dict[int, Outcome]:
        if not claims:
            return {}
        async with self._db.transaction() as tx:
            return {id(claim): await self._look(tx, claim) for claim in claims}

    async def _insert(self, claims: Sequence[NewClaim]) -> set[KeyOf]:
        """Claim the keys that nobody has; return them."""
        if self._db.direct is not None:
            return await claim_new(self._db.direct, claims, self._holder)
        async with self._db.transaction() as tx:
            now = tx.clock.now()
            statement = (
                tx.insert(table)
                .values(
                    state="claimed",
                    holder=self._holder,
                    fence=1,
                    lease_until=now + LEASE_SECONDS,
                    created_at=now,
                )
                .on_conflict_do_nothing()
                .returning(*_COLUMNS)
            )
            rows = [
                {**_named(claim.key), "body_digest": claim.body_digest, "task_id": claim.task_id} for claim in claims
            ]
            done = await tx.execute(statement, rows)
            return {KeyOf(*row) for row in done.all()}

    async def _look(self, tx: Transaction, claim: NewClaim) -> Outcome:
        """Say what stands in the way of a claim; take the key over where its holder is gone."""
        row = await tx.first(select(table).where(_is(claim.key)).with_for_update())
        if row is None:
            return InFlight()  # released since: the next try finds it free
        now = await tx.now()
        found = _found(plain(row), claim.body_digest, now, repeatable=claim.repeatable)
        values: dict[str, object] = {}
        if isinstance(found, Claimed):
            values = {
                "state": "claimed",
                "holder": self._holder,
                "fence": found.run,
                "lease_until": now + LEASE_SECONDS,
            }
        elif isinstance(found, Unknown):
            values = {"state": "unknown"}
        if values:
            await tx.execute(update(table).where(_is(claim.key)).values(values))
        return found

    async def noted(self, key: KeyOf) -> str | None:
        """Return what an earlier holder noted, who did the work but died before its answer was stored."""
        async with self._db.read() as conn:
            found = await conn.scalar(select(table.c.headers).where(_is(key)))
        return None if found is None else found.get("done")

    async def note(self, tx: Transaction, key: KeyOf, done: str) -> None:
        """Note in the transaction that does the work that it is done, so that nobody does it again."""
        await tx.execute(update(table).where(_is(key)).values(headers={"done": done}))

    async def renew(self, claims: Sequence[tuple[KeyOf, int]]) -> None:
        """Prolong the leases of claims."""
        if not claims:
            return
        async with self._db.transaction(single=True) as tx:
            statement = (
                update(table)
                .where(_MINE, table.c.fence == bindparam("of_run"), table.c.state == "claimed")
                .values(lease_until=_now(tx) + LEASE_SECONDS)
            )
            await tx.execute(statement, [{**_of(key), "of_run": run} for key, run in sorted(claims)])

    async def complete(self, key: KeyOf, run: int, kept: Kept) -> None:
        """Store the answer of a claimed call; an older holder's is refused without a word."""
        if len(kept.answer) > MAX_ANSWER:
            await self.release(key, run)
            return
        await self._completions.wait(Completion(key, run, kept))

    async def _complete_all(self, completions: Sequence[Completion]) -> Sequence[None]:
        ordered = sorted(completions, key=lambda each: each.key)
        if self._db.direct is not None:
            await complete_all(self._db.direct, ordered)
            return [None] * len(completions)
        async with self._db.transaction() as tx:
            statement = (
                update(table)
                .where(_MINE, table.c.fence == bindparam("of_run"))
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
                    **_of(each.key),
                    "of_run": each.run,
                    "new_status": each.kept.status,
                    "new_answer": each.kept.answer,
                    "new_headers": dict(each.kept.headers),
                }
                for each in ordered
            ]
            await tx.execute(statement, rows)
        return [None] * len(completions)

    async def release(self, key: KeyOf, run: int) -> None:
        """Give a claim back: the call was not done."""
        async with self._db.transaction(single=True) as tx:
            await tx.execute(delete(table).where(_is(key), table.c.fence == run, table.c.state == "claimed"))

    async def _prune(self, claimed: int) -> None:
        """Drop keys of more than a day ago, leaving those that another process is dropping."""
        self._until_prune -= claimed
        if self._until_prune > 0:
            return
        async with self._db.transaction() as tx:
            before = await tx.now() - KEEP_SECONDS
            old = select(*_COLUMNS).where(table.c.created_at < before).limit(PRUNE).with_for_update(skip_locked=True)
            done = await tx.execute(delete(table).where(tuple_(*_COLUMNS).in_(old)))
        self._until_prune = 0 if done.rowcount >= PRUNE else PRUNE_EVERY


def _now(tx: Transaction) -> Any:
    """Return the moment of a statement, without a question of its own where the server's clock counts."""
    return func.extract("epoch", func.clock_timestamp()) if tx.dialect == "postgresql" else tx.clock.now()


def _named(key: KeyOf) -> dict[str, object]:
    return {name: getattr(key, name) for name in _NAMES}


def _of(key: KeyOf) -> dict[str, object]:
    return {f"of_{name}": getattr(key, name) for name in _NAMES}


def _found(row: Mapping[str, Any], body_digest: str, now: float, *, repeatable: bool) -> Outcome:
    if row["body_digest"] != body_digest:
        return Conflict()
    if row["state"] == "completed":
        return Stored(Kept(row["status"], row["answer"], row["headers"] or {}))
    if row["state"] == "unknown":
        return Unknown()
    if row["lease_until"] > now:
        return InFlight()
    return Claimed(row["fence"] + 1) if repeatable else Unknown()


def _is(key: KeyOf) -> ColumnElement[bool]:
    return and_(*(column == getattr(key, column.name) for column in _COLUMNS))
