"""Accounts: creating, authenticating, listing and revoking API keys and OpenID Connect logins.

Only hashes of keys are stored. Each login of an external issuer has a row as a key has, so that it can be listed and
revoked.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select, update

from octollm.capability import PRESETS, Principal, ScopeSet, preset_scopes
from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.contracts.auth import API_KEY_PREFIX, LOCAL_KEY_ID, IssuerView, KeyList, KeyView, LoginCode, NewKey
from octollm.errors import OctoError
from octollm.services.orchestrator.audit import SYSTEM_TENANT, Actor, record_audit
from octollm.services.orchestrator.oidc import (
    Issuer,
    OidcClient,
    map_claims_to_name,
    map_claims_to_principal,
    map_claims_to_scopes,
)
from octollm.storage import Database, Transaction, row_to_dict
from octollm.storage.tables import api_keys

LOCAL_TENANT = "local"
LAST_USED_INTERVAL = 60.0
"""Seconds between two writes of one key's ``last_used_at``."""


@dataclass(frozen=True, slots=True)
class Account:
    """The principal behind a credential, and its present scopes."""

    principal: Principal
    scopes: ScopeSet


class Accounts:
    """Credentials of all tenants. An API key is ``octo_<id>_<secret>``."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        ids: IdGenerator,
        arms: Callable[[str], Iterable[str]],
        oidc: OidcClient | None = None,
    ) -> None:
        """``arms`` returns the arms whose operations a tenant's users may call; ``oidc`` verifies external logins."""
        self._oidc = oidc
        self._db = db
        self._arms = arms
        self._clock = clock
        self._ids = ids

    async def set_local_key(self, secret: str) -> None:
        """Set the local user's credential, which the gateway presents for a trusted loopback peer."""
        async with self._db.transaction() as tx:
            values = {"hash": hash_credential(secret), "revoked_at": None}
            await tx.execute(
                tx.insert(api_keys)
                .values(
                    id=LOCAL_KEY_ID,
                    tenant=LOCAL_TENANT,
                    sub="local-user",
                    name="local user",
                    scopes="admin",
                    created_at=self._clock.now(),
                    **values,
                )
                .on_conflict_do_update(index_elements=[api_keys.c.id], set_=values)
            )

    async def authenticate(self, credential: str) -> Account:
        """Return the account of a credential; raise ``api_key_invalid`` for an invalid one, without a reason."""
        # `eyJ` is `{"` in base64url: the credential is a token of an issuer, not a key of ours.
        if self._oidc is not None and credential.startswith("eyJ"):
            return await self._upsert_login(*await self._oidc.verify(credential))
        refused = OctoError(
            "The API key is unknown or revoked. Create one with `octollm keys create`.", code="api_key_invalid"
        )
        prefix, _, rest = credential.partition("_")
        key_id, _, _secret = rest.partition("_")
        if prefix + "_" != API_KEY_PREFIX or not key_id or len(credential) > 200:
            raise refused
        row = await self._load_row(key_id)
        # An unknown id is compared as well, so that timing does not reveal which ids exist.
        expected_hash = row["hash"] if row is not None else hash_credential("")
        is_match = hmac.compare_digest(expected_hash, hash_credential(credential))
        if row is None or not is_match or row["revoked_at"] is not None:
            raise refused
        if self._clock.now() - (row["last_used_at"] or 0.0) > LAST_USED_INTERVAL:
            async with self._db.transaction() as tx:
                await tx.execute(update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=self._clock.now()))
        return self._account_from_row(row)

    async def authenticate_code(self, login: LoginCode) -> Account:
        """Return the account of an authorization code; raise ``api_key_invalid`` or ``login_refused``."""
        if self._oidc is None:
            raise OctoError("No OpenID Connect issuer is configured: see OCTOLLM_OIDC.", code="api_key_invalid")
        return await self._upsert_login(*await self._oidc.exchange_code(login))

    async def list_issuers(self) -> tuple[IssuerView, ...]:
        """Return the issuers that accept browser logins."""
        return () if self._oidc is None else await self._oidc.list_issuers()

    async def _upsert_login(self, issuer: Issuer, claims: Mapping[str, Any]) -> Account:
        """Return the account that a login's claims grant now, and update its row."""
        principal, scopes = map_claims_to_principal(issuer, claims), map_claims_to_scopes(issuer, claims)
        if not scopes:
            raise OctoError("The login is valid, but no rule of OCTOLLM_OIDC grants it a scope.", code="login_refused")
        now = self._clock.now()
        changing = {"scopes": scopes, "name": map_claims_to_name(claims), "last_used_at": now}
        async with self._db.transaction() as tx:
            # A login revoked here stays revoked, however long its issuer vouches for it.
            row = await tx.first(select(api_keys).where(api_keys.c.id == principal.cred).with_for_update())
            if row is not None and row["revoked_at"] is not None:
                raise OctoError("The login was revoked here.", code="api_key_invalid")
            if row is None or row["scopes"] != scopes or now - (row["last_used_at"] or 0.0) > LAST_USED_INTERVAL:
                fixed = {"id": principal.cred, "hash": f"oidc:{principal.cred}", "tenant": principal.tenant}
                await tx.execute(
                    tx.insert(api_keys)
                    .values(**fixed, sub=principal.sub, created_at=now, **changing)
                    .on_conflict_do_update(index_elements=[api_keys.c.id], set_=changing)
                )
            if row is None or row["scopes"] != scopes:
                detail = {"issuer": issuer.url, "scope": scopes}
                await record_audit(tx, Actor(principal), "login.granted", principal.cred, now, detail)
        return Account(principal, expand_scopes(scopes, self._arms(principal.tenant)))

    async def find_by_credential(self, cred: str) -> Account:
        """Return the account of a credential's id; raise ``api_key_invalid`` when it was revoked."""
        row = await self._load_row(cred)
        if row is None or row["revoked_at"] is not None:
            raise OctoError("The API key was revoked.", code="api_key_invalid")
        return self._account_from_row(row)

    async def current_scopes(self, cred: str) -> ScopeSet:
        """Return the present scopes of a credential; raise ``authority_missing`` when it was revoked."""
        return self._account_from_row(await self._load_active_row(cred)).scopes

    async def _load_active_row(self, cred: str) -> Mapping[str, Any]:
        row = await self._load_row(cred)
        if row is None or row["revoked_at"] is not None:
            raise OctoError("The credential that the task was submitted with was revoked.", code="authority_missing")
        return row

    async def create(self, name: str, scope: str, actor: Actor, tenant: str | None = None) -> NewKey:
        """Create a key in the actor's tenant, with scopes within the actor's. The secret is returned only here.

        Only the local tenant, which operates the installation, may create keys in another ``tenant``. Raises
        ``scope_missing`` and ``invalid_parameter``.
        """
        own = actor.principal.tenant
        tenant = tenant or own
        if tenant != own and (own != LOCAL_TENANT or tenant == SYSTEM_TENANT):
            raise OctoError("You may create keys only in your own tenant.", code="scope_missing")
        requested = expand_scopes(scope, self._arms(tenant))
        # The creator's scopes of today, not those of its token: they may have been reduced since.
        row = await self._load_active_row(actor.principal.cred)
        if not requested.is_subset(expand_scopes(row["scopes"], self._arms(tenant))):
            raise OctoError("A key may not have scopes that its creator lacks.", code="scope_missing")
        key_id = self._ids.hex()
        secret = f"{API_KEY_PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
        now = self._clock.now()
        async with self._db.transaction() as tx:
            await tx.execute(
                tx.insert(api_keys).values(
                    id=key_id,
                    hash=hash_credential(secret),
                    tenant=tenant,
                    sub=f"key-{key_id}",
                    name=name,
                    scopes=scope,
                    created_at=now,
                )
            )
            detail = {"name": name, "scope": scope, "tenant": tenant}
            await record_audit(tx, actor, "key.added", key_id, now, detail)
            if tenant != own:
                # Both tenants see it in their own audit log.
                foreign_actor = replace(actor, principal=replace(actor.principal, tenant=tenant))
                await record_audit(tx, foreign_actor, "key.added", key_id, now, detail)
        view = KeyView(key_id, name, tenant, scope, format_rfc3339(now))
        return NewKey(view, secret)

    async def list(self, tenant: str) -> KeyList:
        """Return up to 200 keys of a tenant, without secrets, the oldest first."""
        query = select(api_keys).where(api_keys.c.tenant == tenant).order_by(api_keys.c.created_at).limit(200)
        async with self._db.read() as conn:
            rows = await conn.all(query)
        return KeyList(tuple(_key_view_from_row(row_to_dict(row)) for row in rows))

    async def revoke(self, key_id: str, actor: Actor, tx: Transaction) -> None:
        """Revoke a key of the actor's tenant in ``tx``; raise ``not_found`` for another's."""
        now = self._clock.now()
        # The condition decides between two revocations: the second changes no row and is not audited.
        result = await tx.execute(
            update(api_keys)
            .where(
                api_keys.c.id == key_id,
                api_keys.c.tenant == actor.principal.tenant,
                api_keys.c.revoked_at.is_(None),
            )
            .values(revoked_at=now)
        )
        if result.rowcount != 1:
            raise OctoError("There is no such key, or it is revoked already.", code="not_found")
        await record_audit(tx, actor, "key.revoked", key_id, now)

    def _account_from_row(self, row: Mapping[str, Any]) -> Account:
        scopes = expand_scopes(row["scopes"], self._arms(row["tenant"]))
        return Account(Principal(row["sub"], row["id"], row["tenant"]), scopes)

    async def _load_row(self, key_id: str) -> Mapping[str, Any] | None:
        rows = await self._db.fetch("SELECT * FROM api_keys WHERE id = $1", key_id)
        return dict(rows[0]) if rows else None


def expand_scopes(text: str, arms: Iterable[str]) -> ScopeSet:
    """Return the scopes of a list of presets and scopes; raise ``invalid_parameter`` for an empty or malformed one.

    A preset includes the operations of ``arms``.
    """
    return _expand_scopes(text, tuple(arms))


@functools.lru_cache(maxsize=1024)
def _expand_scopes(text: str, admitted: tuple[str, ...]) -> ScopeSet:
    # Each submission and each run of a task needs those of its credential; few texts and few sets of arms are in use.
    expanded = [
        str(part) for word in text.split() for part in (preset_scopes(word, admitted) if word in PRESETS else (word,))
    ]
    scopes = ScopeSet.parse(" ".join(expanded))
    if not len(scopes):
        raise OctoError("A key needs at least one scope, or the preset `user`.", code="invalid_parameter")
    return scopes


def _key_view_from_row(row: Mapping[str, Any]) -> KeyView:
    def time(name: str) -> str | None:
        return None if row[name] is None else format_rfc3339(row[name])

    return KeyView(
        row["id"],
        row["name"],
        row["tenant"],
        row["scopes"],
        format_rfc3339(row["created_at"]),
        time("revoked_at"),
        time("last_used_at"),
    )


def hash_credential(credential: str) -> str:
    """Return the digest that is stored of a generated credential."""
    # A key has 256 random bits: brute force is out of reach, so a slow password hash is not needed.
    return hashlib.sha256(credential.encode()).hexdigest()
