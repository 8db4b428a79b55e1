"""In whose name a call is, once its opener let it in; and how its span tells that."""

from __future__ import annotations

import msgspec

from octollm.capability import VerifiedChain
from octollm.telemetry.chain import CHAIN_ATTRIBUTE, encode_chain
from octollm.telemetry.spans import TASK_ATTRIBUTE, TENANT_ATTRIBUTE, SpanValue


class AuthContext(msgspec.Struct, frozen=True):
    """In whose name a call is: a capability's, or a service's own."""

    verified: VerifiedChain | None = None
    peer: str = ""
    bearer: str = ""
    gateway_tenant: str = ""
    """The tenant of a caller at the door, which is not shown a capability."""

    @property
    def tenant(self) -> str:
        """Return the tenant that the call is for; empty where a service speaks for itself."""
        return self.gateway_tenant if self.verified is None else self.verified.tenant


def auth_span_attributes(auth: AuthContext) -> dict[str, SpanValue]:
    """Return in whose name a call is, and by which chain of authority: claims, never a token."""
    verified = auth.verified
    if verified is None:
        named = {TENANT_ATTRIBUTE: auth.tenant, "octollm.peer": auth.peer}
        return {name: value for name, value in named.items() if value}
    told: dict[str, SpanValue] = {TENANT_ATTRIBUTE: verified.tenant, CHAIN_ATTRIBUTE: encode_chain(verified.links)}
    if verified.task is not None:
        work = verified.task
        named = {
            TASK_ATTRIBUTE: work.task,
            "octollm.step": work.step,
            "octollm.attempt": work.attempt,
            "octollm.run": work.run,
        }
        told |= {name: value for name, value in named.items() if value is not None}
    return told
