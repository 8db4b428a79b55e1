"""Hooks: webhooks of other systems that start tasks.

A delivery is verified, mapped to a task, and recorded with the task in one transaction, so that a repeat of it finds
the task. The task has the authority that is stored with the hook, and no more than its creator has now.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import delete, func, select, update

from octollm.capability import Principal, ScopeSet
from octollm.clock import Clock, format_rfc3339
from octollm.concurrency import BackgroundLoop
from octollm.contracts import hooks as contract
from octollm.contracts.api import Acknowledgement
from octollm.contracts.hooks import (
    HmacSignature,
    HookDelivery,
    HookList,
    HookReceipt,
    HookRequest,
    HookTemplate,
    HookView,
    NewHook,
    SecretRotation,
)
from octollm.contracts.internal_operations import DELIVER_TO_HOOK
from octollm.errors import FieldError, OctoError, map_exceptions
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.audit import Actor, actor_from_call, record_audit
from octollm.services.orchestrator.hook_template import check_template, matches, render_task
from octollm.services.orchestrator.stored_secrets import SecretStore, reseal_rows
from octollm.services.orchestrator.submission import Submission, TaskSubmitter
from octollm.services.orchestrator.webhook_signatures import (
    SignatureError,
    check_secret,
    generate_secret,
    verify_delivery,
)
from octollm.storage import Database, Transaction, row_to_dict
from octollm.storage.tables import hook_receipts, hooks
from octollm.telemetry import Logger

MAX_HOOKS = 200
"""Hooks of one tenant."""
RECEIPT_SECONDS = 30 * 24 * 3600.0
"""How long a delivery is remembered. Senders repeat one for days; GitHub's signature does not expire at all."""
MAINTENANCE_SECONDS = 3600.0


class HookConfig(msgspec.Struct, frozen=True):
    """What a hook's row holds as JSON."""

    template: HookTemplate
    signature: HmacSignature
    tolerance_seconds: int


class _DuplicateDelivery(Exception):  # noqa: N818  ends a transaction
    """The delivery was received before."""


class HooksApi:
    """The operations on hooks, and the receipt of deliveries."""

    def __init__(
        self,
        db: Database,
        accounts: Accounts,
        submitter: TaskSubmitter,
        secret_store: SecretStore,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._db = db
        self._accounts = accounts
        self._submitter = submitter
        self._secrets = secret_store
        self._clock = clock
        self._log = log
        self.maintenance_loop = BackgroundLoop(
            "hooks", self.maintain, interval=MAINTENANCE_SECONDS, restart=True, log=log
        )
        """Runs :meth:`maintain` at the start and each hour."""

    async def create(self, call: IncomingCall, body: HookRequest) -> NewHook:
        """Create a hook. The response holds its secret."""
        check_template(body.template)
        if body.secret is not None:
            check_secret(body.scheme, body.secret)
        elif body.scheme == "stripe":
            detail = "Stripe makes the secret of an endpoint (whsec_…): send it as `secret`."
            raise OctoError(detail, code="invalid_body", field_errors=(FieldError("/secret", detail),))
        principal = call.authority.principal
        own = await self._accounts.current_scopes(principal.cred)
        scopes = ScopeSet.parse(body.scope) if body.scope else own
        if not scopes.is_subset(own):
            raise OctoError("A hook may not have scopes that its creator lacks.", code="scope_missing")
        if not scopes.allows("tasks:create"):
            raise OctoError("A hook starts tasks, so its scope needs tasks:create.", code="authority_missing")
        hook_id = f"{body.name}-{secrets.token_hex(8)}"
        secret = body.secret or generate_secret(body.scheme)
        now = self._clock.now()
        row = {
            "id": hook_id,
            "tenant": principal.tenant,
            "name": body.name,
            "scheme": body.scheme,
            "config": msgspec.to_builtins(HookConfig(body.template, body.signature, body.tolerance_seconds)),
            "secrets": self._secrets.seal(hook_id, secret),
            "scopes": str(scopes),
            "sub": principal.sub,
            "cred": principal.cred,
            "created_at": now,
            "last_received_at": None,
        }
        async with self._db.transaction() as tx:
            count = await tx.scalar(select(func.count()).select_from(hooks).where(hooks.c.tenant == principal.tenant))
            if count >= MAX_HOOKS:
                raise OctoError(f"A tenant may have {MAX_HOOKS} hooks.", code="state_conflict")
            added = await tx.execute(tx.insert(hooks).values(row).on_conflict_do_nothing())
            if added.rowcount != 1:
                raise OctoError(f"A hook named {body.name} already exists.", code="state_conflict")
            detail = {"name": body.name, "scheme": body.scheme, "scope": str(scopes)}
            await record_audit(tx, actor_from_call(call), "hook.created", hook_id, now, detail)
        return NewHook(self._view(row), secret)

    async def list(self, call: IncomingCall, _body: object) -> HookList:
        """Return the tenant's hooks."""
        query = select(hooks).where(hooks.c.tenant == call.tenant).order_by(hooks.c.created_at, hooks.c.id)
        async with self._db.read() as conn:
            rows = await conn.all(query.limit(MAX_HOOKS))
        return HookList(tuple(self._view(row_to_dict(row)) for row in rows))

    async def read(self, call: IncomingCall, _body: object) -> HookView:
        """Return one hook."""
        async with self._db.read() as conn:
            row = await conn.first(select(hooks).where(*_is_hook(call)))
        if row is None:
            raise _hook_not_found()
        return self._view(row_to_dict(row))

    async def delete(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Delete a hook."""
        async with self._db.transaction() as tx:
            deleted = await tx.execute(delete(hooks).where(*_is_hook(call)))
            if deleted.rowcount != 1:
                raise _hook_not_found()
            await record_audit(tx, actor_from_call(call), "hook.deleted", call.path["hook"], self._clock.now())
        return Acknowledgement()

    async def rotate(self, call: IncomingCall, body: SecretRotation) -> NewHook:
        """Give a hook a new secret. The response holds it."""
        async with self._db.transaction() as tx:
            row = await tx.first(select(hooks).where(*_is_hook(call)).with_for_update())
            if row is None:
                raise _hook_not_found()
            if body.secret is not None:
                check_secret(row["scheme"], body.secret)
            secret = body.secret or generate_secret(row["scheme"])
            column = self._secrets.rotate(row["id"], row["secrets"], secret, body.overlap_seconds)
            await tx.execute(update(hooks).where(hooks.c.id == row["id"]).values(secrets=column))
            detail = {"overlap_seconds": body.overlap_seconds}
            await record_audit(tx, actor_from_call(call), "hook.rotated", row["id"], self._clock.now(), detail)
        return NewHook(self._view({**row_to_dict(row), "secrets": column}), secret)

    async def receive(self, call: IncomingCall, body: HookDelivery) -> HookReceipt:
        """Start a task for a delivery, or return the task that it started before.

        Raises ``signature_invalid``, without a reason, for anything but a valid delivery to a hook of a valid creator.
        """
        hook_id = call.path["hook"]
        async with self._db.read() as conn:
            row = await conn.first(select(hooks).where(hooks.c.id == hook_id))
        if row is None:
            raise self._refuse(hook_id, "there is no such hook")
        config = msgspec.convert(row["config"], HookConfig)
        try:
            delivery = verify_delivery(
                row["scheme"],
                config.signature,
                self._secrets.open(hook_id, row["secrets"]),
                body.headers,
                body.body,
                now=self._clock.now(),
                tolerance=config.tolerance_seconds,
            )
            own = await self._accounts.current_scopes(row["cred"])
        except SignatureError as error:
            raise self._refuse(hook_id, str(error)) from None
        except OctoError as error:
            if error.code != "authority_missing":
                raise
            raise self._refuse(hook_id, "its creator was revoked") from None
        scopes = ScopeSet.parse(row["scopes"]).intersection(own)
        if not scopes.allows("tasks:create"):
            raise self._refuse(hook_id, "its creator may no longer submit tasks")
        if task_id := await self._find_receipt(hook_id, delivery.keys):
            return HookReceipt("duplicate", task_id)
        with map_exceptions(
            OctoError("The payload is not JSON.", code="invalid_json"),
            msgspec.DecodeError,
            UnicodeDecodeError,
            RecursionError,
        ):
            payload = msgspec.json.decode(body.body)
        if not matches(config.template, payload):
            return HookReceipt("ignored")
        actor = Actor(Principal(row["sub"], row["cred"], row["tenant"]), call.request_id, call.correlation_id, "hook")
        await self._check_screening(actor, hook_id, body)
        submission = Submission(
            actor.principal,
            scopes,
            render_task(config.template, payload),
            call.correlation_id,
            call.trace.traceparent,
        )

        async def record(tx: Transaction, task_id: str) -> None:
            await self._add_receipts(tx, hook_id, delivery.keys, task_id)
            detail: dict[str, object] = {"hook": hook_id}
            if body.screening is not None:
                detail["screening"] = msgspec.to_builtins(body.screening)
            await record_audit(tx, actor, "task.created", task_id, self._clock.now(), detail)

        try:
            view = await self._submitter.submit(submission, record)
        except _DuplicateDelivery:
            return HookReceipt("duplicate", await self._find_receipt(hook_id, delivery.keys))
        return HookReceipt("accepted", view.task_id)

    async def _find_receipt(self, hook_id: str, keys: tuple[str, ...]) -> str:
        found = select(hook_receipts.c.task_id).where(hook_receipts.c.hook_id == hook_id, hook_receipts.c.key.in_(keys))
        async with self._db.read() as conn:
            return str(await conn.scalar(found.limit(1)) or "")

    async def _add_receipts(self, tx: Transaction, hook_id: str, keys: tuple[str, ...], task_id: str) -> None:
        now = self._clock.now()
        # Sorted, so that two deliveries with the same keys lock them in one order.
        for key in sorted(keys):
            row = {"hook_id": hook_id, "key": key, "task_id": task_id, "received_at": now}
            added = await tx.execute(tx.insert(hook_receipts).values(row).on_conflict_do_nothing())
            if added.rowcount != 1:
                raise _DuplicateDelivery
        await tx.execute(update(hooks).where(hooks.c.id == hook_id).values(last_received_at=now))

    async def _check_screening(self, actor: Actor, hook_id: str, body: HookDelivery) -> None:
        if not body.refused:
            return
        async with self._db.transaction() as tx:
            detail = {"reason": body.refused}
            if body.screening is not None:
                detail |= msgspec.to_builtins(body.screening)
            await record_audit(tx, actor, "goal.refused", hook_id, self._clock.now(), detail)
        raise OctoError(f"{body.refused} OCTOLLM_INPUT_GUARDRAIL sets what is refused.", code="goal_refused")

    def _refuse(self, hook_id: str, reason: str) -> OctoError:
        self._log.warning("hook.refused", hook=hook_id, reason=reason)
        return OctoError("The signature of the delivery is not valid for this hook.", code="signature_invalid")

    def _view(self, row: Mapping[str, Any]) -> HookView:
        config = msgspec.convert(row["config"], HookConfig)
        return HookView(
            id=row["id"],
            name=row["name"],
            path=f"/hooks/{row['id']}",
            scheme=row["scheme"],
            template=config.template,
            signature=config.signature,
            tolerance_seconds=config.tolerance_seconds,
            scope=row["scopes"],
            created_by=row["sub"],
            created_at=format_rfc3339(row["created_at"]),
            secrets=self._secrets.count(row["secrets"]),
            last_received_at=None if row["last_received_at"] is None else format_rfc3339(row["last_received_at"]),
        )

    async def maintain(self) -> None:
        """Forget old deliveries, and encrypt every secret under the present root key."""
        async with self._db.transaction() as tx:
            old = hook_receipts.c.received_at < self._clock.now() - RECEIPT_SECONDS
            await tx.execute(delete(hook_receipts).where(old))
        await reseal_rows(self._db, hooks, self._secrets)

    def operations(self) -> list[Operation]:
        """Return these operations."""
        return [
            implement(contract.CREATE_HOOK, self.create),
            implement(contract.LIST_HOOKS, self.list),
            implement(contract.READ_HOOK, self.read),
            implement(contract.DELETE_HOOK, self.delete),
            implement(contract.ROTATE_HOOK, self.rotate),
            implement(DELIVER_TO_HOOK, self.receive),
        ]


def _is_hook(call: IncomingCall) -> tuple[Any, ...]:
    return hooks.c.id == call.path["hook"], hooks.c.tenant == call.tenant


def _hook_not_found() -> OctoError:
    return OctoError("There is no such hook.", code="not_found")
