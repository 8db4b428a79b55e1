"""AsyncAdmin: API keys, enrolment tokens, arms, tokens, revocation and the audit log."""

from __future__ import annotations

from collections.abc import Iterable

from octollm.client._transport import GatewayTransport
from octollm.contracts.auth import KeyRequest, KeyView, NewKey, RevocationRequest, TokenRequest, TokenResponse
from octollm.contracts.enrolment import EnrolmentTokenRequest, EnrolmentTokenView, NewEnrolmentToken
from octollm.contracts.observability import AuditPage
from octollm.contracts.public_api import (
    CREATE_ENROLMENT_TOKEN,
    CREATE_KEY,
    CREATE_TOKEN,
    LIST_ENROLMENT_TOKENS,
    LIST_KEYS,
    READ_AUDIT_LOG,
    REMOVE_ARM,
    REVOKE_AUTHORITY,
    REVOKE_ENROLMENT_TOKEN,
    REVOKE_KEY,
)


class AsyncAdmin:
    """Administration of an installation, as ``client.admin``. Most methods need scopes of the preset ``admin``.

    Every method raises :class:`~octollm.client.APIError`. :meth:`mint_token` is not repeated when its response was
    lost: a token that nobody received would stay valid.
    """

    def __init__(self, transport: GatewayTransport) -> None:
        self._transport = transport

    async def keys(self) -> tuple[KeyView, ...]:
        """Return the API keys of the tenant, without their secrets."""
        return (await self._transport.call(LIST_KEYS)).keys

    async def create_key(self, name: str, *, scope: str = "user", tenant: str | None = None) -> NewKey:
        """Create an API key; the response has its ``secret``, this once.

        ``scope`` has presets (``user``, ``admin``) and scopes, separated by spaces. ``tenant`` defaults to the caller's
        own; the operator of the installation creates the first key of another.
        """
        return await self._transport.call(CREATE_KEY, KeyRequest(name, scope, tenant))

    async def revoke_key(self, key_id: str) -> None:
        """Revoke an API key by its id. Its tokens are void and its tasks are cancelled."""
        await self._transport.call(REVOKE_KEY, key_id=key_id)

    async def enrolment_tokens(self) -> tuple[EnrolmentTokenView, ...]:
        """Return the enrolment tokens of the tenant, without their secrets."""
        return (await self._transport.call(LIST_ENROLMENT_TOKENS)).joins

    async def create_enrolment_token(
        self, name: str, *, calls: Iterable[str] = (), lifetime_seconds: int = 86_400
    ) -> NewEnrolmentToken:
        """Create a token with which the arm ``name`` enrols; the response has its ``secret``, this once.

        The arm may declare at most ``calls`` (scopes such as ``retriever:search``).
        """
        request = EnrolmentTokenRequest(name, tuple(calls), lifetime_seconds)
        return await self._transport.call(CREATE_ENROLMENT_TOKEN, request)

    async def revoke_enrolment_token(self, token_id: str) -> None:
        """Revoke an enrolment token by its id. An arm that enrolled with it stays."""
        await self._transport.call(REVOKE_ENROLMENT_TOKEN, join_id=token_id)

    async def remove_arm(self, name: str) -> None:
        """Remove an arm that enrolled: its keys and grants are revoked, and its name is free."""
        await self._transport.call(REMOVE_ARM, name=name)

    async def mint_token(self, scope: str, *, aud: str, lifetime_seconds: int = 3600) -> TokenResponse:
        """Mint a token for direct calls to the service ``aud``, with a task and a budget of its own."""
        return await self._transport.call(CREATE_TOKEN, TokenRequest(scope, aud, lifetime_seconds))

    async def revoke_token(self, jti: str) -> None:
        """Revoke a token by its ``jti``, with every token derived from it. Services refuse it within a second."""
        await self._transport.call(REVOKE_AUTHORITY, RevocationRequest("jti", jti))

    async def revoke_service(self, name: str) -> None:
        """Revoke every grant to a service until now, for instance because its key was compromised."""
        await self._transport.call(REVOKE_AUTHORITY, RevocationRequest("aud", name))

    async def revoke_principal(self, sub: str) -> None:
        """Revoke every token of a principal until now, and cancel its tasks."""
        await self._transport.call(REVOKE_AUTHORITY, RevocationRequest("sub", sub))

    async def audit(self, *, after: int = 0, limit: int = 200, system: bool = False) -> AuditPage:
        """Return up to ``limit`` (1 to 500) audit rows after the row ``after``, oldest first, and the chain's head.

        ``system`` selects the rows of no tenant, such as refused credentials.
        """
        query = {"after": after, "limit": limit, "of": "system" if system else None}
        return await self._transport.call(READ_AUDIT_LOG, query=query)
