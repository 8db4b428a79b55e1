"""Authentication and authorization of an operation: by capability token, by service token, or public.

An authenticator returns an :class:`AuthContext`, or raises the problem that the caller gets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
from starlette.requests import Request

from octollm.capability import CapabilityError, DirectoryEntry, Scope, VerifiedChain, Verifier
from octollm.capability.service_tokens import ServiceTokenVerifier
from octollm.capability.tokens import AccessClaims, GrantClaims, TokenClaims
from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.rpc.call import Operation
from octollm.rpc.identity import ServiceDirectory
from octollm.rpc.revocations import RevocationSubscriber
from octollm.telemetry.spans import TASK_ATTRIBUTE, TENANT_ATTRIBUTE, SpanValue

CHAIN_ATTRIBUTE = "octollm.chain"


class ChainLink(msgspec.Struct, frozen=True):
    """One link of a chain in a span: ``iss`` allowed ``aud`` to use ``scope``. A grant's scope is its tree, as JSON."""

    iss: str
    aud: str
    scope: str
    jti: str


def encode_chain(links: Sequence[TokenClaims]) -> tuple[str, ...]:
    """Return each link as JSON, the root's first and the access token last.

    ``links`` has the order of a bearer string: the access token, then the grants.
    """
    ordered = (*links[1:], links[0])
    return tuple(
        [msgspec.json.encode(ChainLink(link.iss, link.aud, _link_scope(link), link.jti)).decode() for link in ordered]
    )


def _link_scope(link: TokenClaims) -> str:
    if isinstance(link, GrantClaims):
        return msgspec.json.encode(link.may.to_dict()).decode()
    return str(link.scope) if isinstance(link, AccessClaims) else ""


class AuthContext(msgspec.Struct, frozen=True):
    """The authenticated caller: the principal of a capability, or the service ``peer`` itself."""

    verified: VerifiedChain | None = None
    peer: str = ""
    bearer: str = ""
    gateway_tenant: str = ""
    """The tenant of a caller of the gateway, who has no capability there."""

    @property
    def tenant(self) -> str:
        """Return the tenant that the call is for; empty when a service calls on its own behalf."""
        return self.gateway_tenant if self.verified is None else self.verified.tenant


def auth_span_attributes(auth: AuthContext) -> dict[str, SpanValue]:
    """Return the caller and its chain of authority as span attributes: claims, never a token."""
    verified = auth.verified
    if verified is None:
        peer = {TENANT_ATTRIBUTE: auth.tenant, "octollm.peer": auth.peer}
        return {name: value for name, value in peer.items() if value}
    attributes: dict[str, SpanValue] = {
        TENANT_ATTRIBUTE: verified.tenant,
        CHAIN_ATTRIBUTE: encode_chain(verified.links),
    }
    if verified.task is not None:
        work = verified.task
        task_attributes = {
            TASK_ATTRIBUTE: work.task,
            "octollm.step": work.step,
            "octollm.attempt": work.attempt,
            "octollm.run": work.run,
        }
        attributes |= {name: value for name, value in task_attributes.items() if value is not None}
    return attributes


_STALE_DIRECTORY_REASONS = frozenset({"service_unknown", "key_mismatch"})
"""Refusals that may come from a stale directory: another replica may have enrolled the service a moment ago."""


def parse_bearer_token(request: Request) -> str:
    """Return the one bearer string of a request (RFC 6750 section 2.1); raise ``token_missing`` without one."""
    values = [value for name, value in request.scope["headers"] if name == b"authorization"]
    if not values:
        raise OctoError(
            "This needs a bearer token in the Authorization header; `octollm token mint` makes one.",
            code="token_missing",
        )
    scheme, _, token = values[0].decode("latin-1").partition(" ")
    # Of two headers, which one counts would be up to the reader: neither is accepted.
    if len(values) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise OctoError("The Authorization header must be one `Bearer <token>`.", code="token_malformed")
    return token.strip()


def required_scope(request: Request, operation: Operation) -> str:
    """Return the scope that ``operation`` requires for this request: path parameters become selectors."""
    scope = operation.scope
    for name, value in request.path_params.items():
        scope = scope.replace("{" + name + "}", str(value))
    return scope


class CapabilityAuthenticator:
    """Requires an access token for this service that allows the operation's scope."""

    def __init__(self, verifier: Verifier, revocations: RevocationSubscriber | None = None) -> None:
        """``revocations`` keeps the verifier's list up to date; ``None`` where the list is local."""
        self._verifier = verifier
        self._revocations = revocations
        self._parsed_scopes: dict[str, Scope] = {}
        """Scopes of operations without path parameters: bounded by the number of operations."""

    async def authenticate(self, request: Request, operation: Operation) -> AuthContext:
        """Return the verified capability; raise a ``token_*`` code, ``scope_missing`` or ``revocations_unknown``."""
        bearer = parse_bearer_token(request)
        verified = self._verifier.verify(bearer)
        if self._revocations is not None:
            self._revocations.check(read_only=operation.kind == "read_only")
        scope = self._parsed_scopes.get(operation.scope)
        if scope is None:
            text = required_scope(request, operation)
            # Deny by default: an operation that declares no scope is closed to everyone.
            if not text:
                raise OctoError("No scope allows this operation.", code="scope_missing")
            try:
                scope = Scope(text)
            except CapabilityError as error:
                # The declared scope is well-formed, so a parameter of the path is not.
                names = ", ".join(f"{name} {value!a}" for name, value in request.path_params.items())
                detail = f"The path has a name with characters that no name has: {names[:300]}."
                raise OctoError(detail, code="invalid_parameter") from error
            # A scope with selectors differs from call to call: cached, it would grow without a bound.
            if text == operation.scope:
                self._parsed_scopes[text] = scope
        if not verified.scopes.allows(scope):
            raise OctoError(f"The token does not allow {scope}.", code="scope_missing")
        return AuthContext(verified=verified, bearer=bearer)


class ServiceAuthenticator:
    """Requires a service's own token (``svc+jwt``), of a service that the operation names.

    ``directory`` returns the known services; ``refresh_directory`` reads them again when the caller is not among them.
    """

    def __init__(
        self,
        audience: str,
        directory: Callable[[], Mapping[str, DirectoryEntry]],
        clock: Clock,
        refresh_directory: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._verifier = ServiceTokenVerifier(audience, clock)
        self._directory = directory
        self._refresh_directory = refresh_directory

    async def authenticate(self, request: Request, operation: Operation) -> AuthContext:
        """Return the service's name. ``operation.scope`` lists the admitted services; ``*`` admits any registered."""
        bearer = parse_bearer_token(request)
        try:
            peer = self._verifier.verify(bearer, self._directory())
        except CapabilityError as error:
            if self._refresh_directory is None or error.reason not in _STALE_DIRECTORY_REASONS:
                raise
            await self._refresh_directory()
            peer = self._verifier.verify(bearer, self._directory())
        _require_admitted(peer, operation)
        return AuthContext(peer=peer, bearer=bearer)


class RegisteredServiceAuthenticator:
    """As :class:`ServiceAuthenticator`, by the orchestrator's directory, which this service reads remotely."""

    def __init__(self, audience: str, directory: ServiceDirectory, clock: Clock) -> None:
        self._verifier = ServiceTokenVerifier(audience, clock)
        self._directory = directory

    async def authenticate(self, request: Request, operation: Operation) -> AuthContext:
        """Return the service's name. Raises a ``token_*`` code, ``scope_missing``, or the directory's error."""
        bearer = parse_bearer_token(request)
        try:
            peer = self._verifier.verify(bearer, await self._directory.entries())
        except CapabilityError as error:
            if error.reason not in _STALE_DIRECTORY_REASONS:
                raise
            # The service may have registered, or rotated its key, since the directory was read.
            peer = self._verifier.verify(bearer, await self._directory.entries(fresh=True))
        _require_admitted(peer, operation)
        return AuthContext(peer=peer, bearer=bearer)


def _require_admitted(peer: str, operation: Operation) -> None:
    admitted = operation.scope.split()
    if "*" not in admitted and peer not in admitted:
        raise OctoError(f"{peer} may not call this operation.", code="scope_missing")


class PublicAuthenticator:
    """Admits every caller: for health, readiness and public keys."""

    async def authenticate(self, request: Request, operation: Operation) -> AuthContext:
        """Return an anonymous context."""
        del request, operation
        return AuthContext()
