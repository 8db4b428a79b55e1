"""Enrolment of an arm with the orchestrator, and the rotation of its key.

The arm proves possession of its enrolment token and learns which root keys to trust; the token is never sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
from octollm.concurrency import retry
from octollm.contracts.declarations import BodyT, DeclaredOperation
from octollm.contracts.enrolment import EnrolmentNonce, EnrolmentRequest, EnrolmentResponse, KeyRotation
from octollm.contracts.internal_operations import ENROL_ARM, ISSUE_NONCE, ROTATE_ARM_KEY
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline, retry_until
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
    """Enrol as ``name`` with ``key`` and the declared ``calls``; return the root keys to pin, by thumbprint.

    It waits up to ``max_wait`` seconds for an orchestrator that is away. Enrolling again with the same key is
    harmless. Raises ``join_refused``; ``join_unproven`` when the peer does not know the token, and so is not the
    orchestrator; ``invalid_body`` for a name or calls that are not allowed; ``rate_limited``.
    """
    check_arm_name(name)
    token = EnrolmentToken.parse(enrolment_token.strip())
    scopes = scopes_of(parse_declared_calls(calls))
    client = ServiceClient(name, http, discovery, clock=clock, ids=ids, metrics=Metrics(name))
    return await retry(
        lambda: _enrol_once(client, clock, name, key, token, scopes),
        retry_until(Deadline.after(clock, max_wait), _PAUSE_SECONDS, _is_transient),
    )


async def rotate_key(client: ServiceClient, identity: ServiceIdentity, new_key: SigningKey) -> None:
    """Register a new key for the service ``identity``; its present key signs the request.

    The present key stays valid for another hour. Raises ``scope_missing`` for a service that is not enrolled.
    """
    message = rotation_message(identity.name, new_key.thumbprint)
    body = KeyRotation(new_key.public.to_jwk(), b64encode(new_key.sign(message)))
    await client.send(_create_call(identity.clock, ROTATE_ARM_KEY, body, identity.signer().sign_token("orchestrator")))


async def _enrol_once(
    client: ServiceClient,
    clock: Clock,
    name: str,
    key: SigningKey,
    enrolment_token: EnrolmentToken,
    calls: tuple[str, ...],
) -> Mapping[str, PublicKey]:
    nonce = (await client.call(_create_call(clock, ISSUE_NONCE, None), EnrolmentNonce)).nonce
    claim = EnrolmentClaim(nonce, name, key.thumbprint, calls)
    request = EnrolmentRequest(
        enrolment_token.id, name, key.public.to_jwk(), calls, nonce, arm_proof(enrolment_token.key, claim)
    )
    response = await client.call(_create_call(clock, ENROL_ARM, request), EnrolmentResponse)
    roots = _parse_roots(response)
    # The proof covers the root keys: whoever sits between cannot replace them without knowing the token.
    if not proofs_match(root_proof(enrolment_token.key, claim, roots), response.proof):
        raise OctoError(
            "The peer does not know the enrolment token, so its root keys are not trusted. Check that"
            " OCTOLLM_ORCHESTRATOR_URL is the installation that issued the token.",
            code="join_unproven",
        )
    return roots


def _parse_roots(response: EnrolmentResponse) -> dict[str, PublicKey]:
    try:
        if not 0 < len(response.roots) <= MAX_ROOTS:
            raise CapabilityError("key_malformed")
        keys = [PublicKey.from_jwk(jwk) for jwk in response.roots]
    except CapabilityError as error:
        raise OctoError("The peer sent no root keys, or malformed ones.", code="join_unproven") from error
    return {key.thumbprint: key for key in keys}


def _create_call(
    clock: Clock, declared: DeclaredOperation[BodyT, Any], body: BodyT, bearer: str = "none"
) -> OutgoingCall:
    return OutgoingCall(
        CallTarget.of(declared),
        bearer,
        Deadline.after(clock, _CALL_SECONDS),
        None if body is None else msgspec.json.encode(body),
    )


def _is_transient(error: OctoError) -> bool:
    """Return whether another attempt with a new nonce may help: the orchestrator was away, or overloaded."""
    if isinstance(error, RemoteError):
        return error.retryable and error.code != "rate_limited"
    return isinstance(error, TransportError) or error.code in ("unavailable", "deadline_exceeded")
