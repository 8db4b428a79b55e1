"""Enrolment of an arm: it proves possession of its enrolment token, learns which root keys to trust, and later rotates its key."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.enrolment import (
    EnrolmentClaim,
    EnrolmentToken,
    arm_proof,
    check_arm_name,
    parse_declared_calls,
    proofs_match,
    root_proof,
    rotation_message,
    scopes_of,
)
from octollm.capability.jose import b64encode
from octollm.clock import Clock, IdGenerator
from octollm.contracts.enrolment import EnrolmentNonce, EnrolmentRequest, EnrolmentResponse, KeyRotation
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.discovery import Discovery
from octollm.rpc.http_client import HttpClient, TransportError
from octollm.rpc.identity import ServiceIdentity
from octollm.telemetry import Metrics

MAX_ROOTS = 16
_CALL_SECONDS = 10.0
_PAUSE_SECONDS = 0.5


async def enrol(
    http: HttpClient,
    discovery: Discovery,
    clock: Clock,
    ids: IdGenerator,
    *,
    name: str,
    key: SigningKey,
    enrolment_token: str,
    calls: Sequence[str],
    max_wait: float = 60.0,
) -> Mapping[str, PublicKey]:
    """Join as ``name`` with ``key``, and return the root keys to pin, by thumbprint.

    ``calls`` are those that the arm declares. An orchestrator that is not there is waited for, ``seconds`` at most.
    Joining again with the same key is harmless. Raises ``join_refused``; ``join_unproven`` when who answered does not
    know the secret, and so may be anybody; ``invalid_body`` for a name or calls that cannot be; ``rate_limited``.
    """
    check_arm_name(name)
    own = EnrolmentToken.parse(enrolment_token.strip())
    scopes = scopes_of(parse_declared_calls(calls))
    caller = ServiceClient(name, http, discovery, clock=clock, ids=ids, metrics=Metrics(name))
    end = Deadline.after(clock, max_wait)
    while True:
        try:
            return await _enrol_once(caller, clock, name, key, own, scopes)
        except OctoError as error:
            if not _is_transient(error) or end.remaining() <= _PAUSE_SECONDS:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)


async def rotate_key(client: ServiceClient, identity: ServiceIdentity, new_key: SigningKey) -> None:
    """Bring a new key of the service ``identity``, whose present key signs the request.

    The present key is good for an hour more. Raises ``scope_missing`` for a service that did not join.
    """
    message = rotation_message(identity.name, new_key.thumbprint)
    body = KeyRotation(new_key.public.to_jwk(), b64encode(new_key.sign(message)))
    await client.send(_create_call(identity.clock, "keys", body, identity.signer().sign_token("orchestrator")))


async def _enrol_once(
    client: ServiceClient,
    clock: Clock,
    name: str,
    key: SigningKey,
    enrolment_token: EnrolmentToken,
    calls: tuple[str, ...],
) -> Mapping[str, PublicKey]:
    nonce = (await client.call(_create_call(clock, "nonce", None), EnrolmentNonce)).nonce
    claim = EnrolmentClaim(nonce, name, key.thumbprint, calls)
    request = EnrolmentRequest(
        enrolment_token.id, name, key.public.to_jwk(), calls, nonce, arm_proof(enrolment_token.key, claim)
    )
    answer = await client.call(_create_call(clock, "join", request), EnrolmentResponse)
    roots = _parse_roots(answer)
    if not proofs_match(root_proof(enrolment_token.key, claim, roots), answer.proof):
        raise OctoError(
            "What answered does not know the join secret, so its root keys are not trusted. Check that"
            " OCTOLLM_ORCHESTRATOR_URL is the installation that made the secret.",
            code="join_unproven",
        )
    return roots


def _parse_roots(answer: EnrolmentResponse) -> dict[str, PublicKey]:
    try:
        if not 0 < len(answer.roots) <= MAX_ROOTS:
            raise CapabilityError("key_malformed")
        keys = [PublicKey.from_jwk(jwk) for jwk in answer.roots]
    except CapabilityError as error:
        raise OctoError("What answered sent no root keys, or malformed ones.", code="join_unproven") from error
    return {key.thumbprint: key for key in keys}


def _create_call(clock: Clock, action: str, body: object, bearer: str = "none") -> OutgoingCall:
    # A nonce is spent by the first try that arrives, so only what surely did not arrive is tried again.
    kind = "at_most_once" if action == "join" else "read_only"
    return OutgoingCall(
        CallTarget("orchestrator", f"arms.{action}", "POST", f"/arms/{action}", kind),
        bearer,
        Deadline.after(clock, _CALL_SECONDS),
        None if body is None else msgspec.json.encode(body),
    )


def _is_transient(error: OctoError) -> bool:
    """Say whether trying again with another nonce may help: nobody answered, or it was at its limit for a moment."""
    if isinstance(error, RemoteError):
        return error.retryable and error.code != "rate_limited"
    return isinstance(error, TransportError) or error.code in ("unavailable", "deadline_exceeded")
