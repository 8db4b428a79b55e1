"""Webhooks that come in, at the gateway: bounds, screening, and the way to the orchestrator, which verifies them.

Nobody is authenticated here: the signature is the credential, and only the orchestrator can read the secrets.
"""

from __future__ import annotations

from collections import Counter

import msgspec
from starlette.datastructures import Headers

from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock
from octollm.contracts.hooks import RECEIVE_HOOK, HookDelivery, HookReceipt
from octollm.contracts.internal_operations import DELIVER_TO_HOOK
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.services.reflex.screening import InputGuardrail
from octollm.services.reflex.throttle import RateLimiter, get_address_bucket

RECEIVE_SECONDS = 15.0
"""Senders wait for 10 to 30 s."""
MAX_HEADERS = 64
MAX_HEADER_VALUE = 4096
_PRIVATE_HEADERS = frozenset({"authorization", "cookie", "host", "connection", "content-length", "transfer-encoding"})


class HookReceiver:
    """Hands deliveries to the orchestrator with the gateway's own service token."""

    def __init__(
        self,
        caller: ServiceClient,
        signer: ServiceTokenSigner,
        guardrail: InputGuardrail,
        rate_limiter: RateLimiter,
        clock: Clock,
    ) -> None:
        self._caller = caller
        self._signer = signer
        self._guardrail = guardrail
        self._rate_limiter = rate_limiter
        self._clock = clock

    async def receive(self, call: IncomingCall, _body: object) -> HookReceipt:
        """Return what became of a delivery."""
        request = call.request
        await self._rate_limiter.hit(get_address_bucket(request.client.host if request.client is not None else ""))
        if not call.body:
            raise OctoError("A delivery has a body.", code="invalid_body")
        screening, refused = self._guardrail.check_payload(call.body)
        delivery = HookDelivery(_signed_headers(request.headers), call.body, screening, refused)
        outgoing = OutgoingCall(
            # Repeated freely: the orchestrator knows a delivery that it has received before.
            CallTarget.of(DELIVER_TO_HOOK, hook=str(call.path["hook"])),
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, RECEIVE_SECONDS),
            msgspec.json.encode(delivery),
        )
        return await self._caller.call(outgoing, HookReceipt)

    def operations(self) -> list[Operation]:
        """Return the operation that receives deliveries."""
        return [implement(RECEIVE_HOOK, self.receive, auth="public", timeout=RECEIVE_SECONDS)]


def _signed_headers(headers: Headers) -> dict[str, str]:
    """Return the headers that may take part in a signature.

    A header that is there twice is left out: which of the two counts would be up to the reader.
    """
    counts = Counter(headers.keys())
    kept = {
        name: value
        for name, value in headers.items()
        if counts[name] == 1 and name not in _PRIVATE_HEADERS and len(value) <= MAX_HEADER_VALUE
    }
    return dict(list(kept.items())[:MAX_HEADERS])
