"""AsyncAdmin: API keys, enrolment tokens, arms, hooks, webhooks, tokens, revocation and the audit log."""

from __future__ import annotations

from collections.abc import Iterable

from octollm.client._transport import GatewayTransport
from octollm.contracts.auth import KeyRequest, KeyView, NewKey, RevocationRequest, TokenRequest, TokenResponse
from octollm.contracts.enrolment import EnrolmentTokenRequest, EnrolmentTokenView, NewEnrolmentToken
from octollm.contracts.hooks import (
    CREATE_HOOK,
    DELETE_HOOK,
    LIST_HOOKS,
    READ_HOOK,
    ROTATE_HOOK,
    HmacSignature,
    HookRequest,
    HookTemplate,
    HookView,
    NewHook,
    SecretRotation,
    SignatureScheme,
)
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
from octollm.contracts.webhooks import (
    CREATE_WEBHOOK,
    DELETE_WEBHOOK,
    LIST_WEBHOOK_DELIVERIES,
    LIST_WEBHOOKS,
    READ_WEBHOOK,
    REPLAY_WEBHOOK,
    ROTATE_WEBHOOK,
    TEST_WEBHOOK,
    UPDATE_WEBHOOK,
    DeliveryState,
    NewWebhook,
    WebhookDeliveryList,
    WebhookReplay,
    WebhookReplayResult,
    WebhookRequest,
    WebhookTestResult,
    WebhookView,
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

    async def hooks(self) -> tuple[HookView, ...]:
        """Return the hooks of the tenant, without their secrets."""
        return (await self._transport.call(LIST_HOOKS)).hooks

    async def hook(self, hook_id: str) -> HookView:
        """Return one hook."""
        return await self._transport.call(READ_HOOK, hook=hook_id)

    async def create_hook(
        self,
        name: str,
        *,
        scheme: SignatureScheme,
        template: HookTemplate,
        signature: HmacSignature = HmacSignature(),  # noqa: B008  frozen
        secret: str | None = None,
        scope: str = "",
    ) -> NewHook:
        """Create a hook, which turns another system's webhooks into tasks; the response has its ``secret``, this once.

        ``secret`` is the sender's own, if the sender makes it. ``scope`` narrows what the tasks may use; by default
        that is all that the caller may.
        """
        request = HookRequest(name, scheme, template, secret, signature, scope=scope)
        return await self._transport.call(CREATE_HOOK, request)

    async def rotate_hook(self, hook_id: str, *, overlap_seconds: int = 86_400, secret: str | None = None) -> NewHook:
        """Give a hook a new secret; the former one stays valid for ``overlap_seconds``."""
        return await self._transport.call(ROTATE_HOOK, SecretRotation(overlap_seconds, secret), hook=hook_id)

    async def delete_hook(self, hook_id: str) -> None:
        """Delete a hook. Tasks that it started continue."""
        await self._transport.call(DELETE_HOOK, hook=hook_id)

    async def webhooks(self) -> tuple[WebhookView, ...]:
        """Return the webhooks of the tenant, without their secrets."""
        return (await self._transport.call(LIST_WEBHOOKS)).webhooks

    async def webhook(self, webhook_id: str) -> WebhookView:
        """Return one webhook."""
        return await self._transport.call(READ_WEBHOOK, webhook_id=webhook_id)

    async def create_webhook(self, request: WebhookRequest) -> NewWebhook:
        """Create a webhook, which delivers events from now on; the response has its ``secret``, this once."""
        return await self._transport.call(CREATE_WEBHOOK, request)

    async def update_webhook(self, webhook_id: str, request: WebhookRequest) -> WebhookView:
        """Change a webhook, or enable or disable it; ``request`` is what it becomes."""
        return await self._transport.call(UPDATE_WEBHOOK, request, webhook_id=webhook_id)

    async def rotate_webhook(self, webhook_id: str, *, overlap_seconds: int = 86_400) -> NewWebhook:
        """Give a webhook a new secret; deliveries are signed with both for ``overlap_seconds``."""
        return await self._transport.call(ROTATE_WEBHOOK, SecretRotation(overlap_seconds), webhook_id=webhook_id)

    async def test_webhook(self, webhook_id: str) -> WebhookTestResult:
        """Deliver a test event now, and return what the receiver answered."""
        return await self._transport.call(TEST_WEBHOOK, webhook_id=webhook_id)

    async def webhook_deliveries(
        self, webhook_id: str, *, state: DeliveryState | None = None, limit: int = 50, cursor: str = ""
    ) -> WebhookDeliveryList:
        """Return a page of deliveries, newest first; ``state="dead"`` selects the dead letters."""
        query = {"state": state, "limit": limit, "cursor": cursor or None}
        return await self._transport.call(LIST_WEBHOOK_DELIVERIES, query=query, webhook_id=webhook_id)

    async def replay_webhook(
        self, webhook_id: str, *, event_ids: Iterable[str] = (), after: int | None = None
    ) -> WebhookReplayResult:
        """Deliver again under the same ids: the dead letters, these events, or what the log has after a position."""
        request = WebhookReplay(tuple(event_ids), after)
        return await self._transport.call(REPLAY_WEBHOOK, request, webhook_id=webhook_id)

    async def delete_webhook(self, webhook_id: str) -> None:
        """Delete a webhook with its deliveries."""
        await self._transport.call(DELETE_WEBHOOK, webhook_id=webhook_id)

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
