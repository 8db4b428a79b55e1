"""An arm of one's own joins an installation: it proves its join secret, and learns which root keys to trust."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.joining import (
    JoinClaim,
    JoinSecret,
    arm_proof,
    check_arm_name,
    declared_calls,
    root_proof,
    rotation_message,
    same,
    scopes_of,
)
from octollm.capability.keys import b64encode
from octollm.clock import Clock, Ids
from octollm.contracts.joining import JoinAnswer, JoinNonce, JoinRequest, KeyRotation
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target
from octollm.rpc.discovery import Discovery
from octollm.rpc.http import Http, TransportError
from octollm.rpc.identity import Identity
from octollm.telemetry import Metrics

MAX_ROOTS = 16
_CALL_SECONDS = 10.0
_PAUSE_SECONDS = 0.5


async def join(
    http: Http,
    discovery: Discovery,
    clock: Clock,
    ids: Ids,
    *,
    name: str,
    key: SigningKey,
    secret: str,
    calls: Sequence[str],
    seconds: float = 60.0,
) -> Mapping[str, PublicKey]:
    """Join as ``name`` with ``key``, and return the root keys to pin, by thumbprint.

    ``calls`` are those that the arm declares. An orchestrator that is not there is waited for, ``seconds`` at most.
    Joining again with the same key is harmless. Raises ``join_refused``; ``join_unproven`` when who answered does not
    know the secret, and so may be anybody; ``invalid_body`` for a name or calls that cannot be; ``rate_limited``.
    """
    check_arm_name(name)
    own = JoinSecret.parse(secret.strip())
    scopes = scopes_of(declared_calls(calls))
    caller = Caller(name, http, discovery, clock=clock, ids=ids, metrics=Metrics(name))
    end = Deadline.after(clock, seconds)
    while True:
        try:
            return await _join(caller, clock, name, key, own, scopes)
        except OctoError as error:
            if not _may_pass(error) or end.left() <= _PAUSE_SECONDS:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)


async def bring_key(caller: Caller, identity: Identity, fresh: SigningKey) -> None:
    """Bring a new key of the service ``identity``, whose present key signs the request.

    The present key is good for an hour more. Raises ``scope_missing`` for a service that did not join.
    """
    message = rotation_message(identity.name, fresh.thumbprint)
    body = KeyRotation(fresh.public.to_jwk(), b64encode(fresh.sign(message)))
    await caller.send(_call(identity.clock, "keys", body, identity.signer().svc_token("orchestrator")))


async def _join(
    caller: Caller, clock: Clock, name: str, key: SigningKey, secret: JoinSecret, calls: tuple[str, ...]
) -> Mapping[str, PublicKey]:
    nonce = (await caller.answer(_call(clock, "nonce", None), JoinNonce)).nonce
    claim = JoinClaim(nonce, name, key.thumbprint, calls)
    request = JoinRequest(secret.id, name, key.public.to_jwk(), calls, nonce, arm_proof(secret.key, claim))
    answer = await caller.answer(_call(clock, "join", request), JoinAnswer)
    roots = _roots(answer)
    if not same(root_proof(secret.key, claim, roots), answer.proof):
        raise OctoError(
            "What answered does not know the join secret, so its root keys are not trusted. Check that"
            " OCTOLLM_ORCHESTRATOR_URL is the installation that made the secret.",
            code="join_unproven",
        )
    return roots


def _roots(answer: JoinAnswer) -> dict[str, PublicKey]:
    try:
        if not 0 < len(answer.roots) <= MAX_ROOTS:
            raise CapabilityError("key_malformed")
        keys = [PublicKey.from_jwk(jwk) for jwk in answer.roots]
    except CapabilityError as error:
        raise OctoError("What answered sent no root keys, or malformed ones.", code="join_unproven") from error
    return {key.thumbprint: key for key in keys}


def _call(clock: Clock, action: str, body: object, bearer: str = "none") -> Outgoing:
    # A nonce is spent by the first try that arrives, so only what surely did not arrive is tried again.
    kind = "at_most_once" if action == "join" else "read_only"
    return Outgoing(
        Target("orchestrator", f"arms.{action}", "POST", f"/arms/{action}", kind),
        bearer,
        Deadline.after(clock, _CALL_SECONDS),
        None if body is None else msgspec.json.encode(body),
    )


def _may_pass(error: OctoError) -> bool:
    """Say whether trying again with another nonce may help: nobody answered, or it was at its limit for a moment."""
    if isinstance(error, RemoteError):
        return error.retryable and error.code != "rate_limited"
    return isinstance(error, TransportError) or error.code in ("unavailable", "deadline_exceeded")
