"""In whose name a call is, once its opener let it in; and how its span tells that."""

from __future__ import annotations

import msgspec

from octollm.capability import Verified
from octollm.telemetry.chain import CHAIN, chain_of
from octollm.telemetry.spans import TASK, TENANT, SpanValue


class Opened(msgspec.Struct, frozen=True):
    """In whose name a call is: a capability's, or a service's own."""

    verified: Verified | None = None
    peer: str = ""
    bearer: str = ""
    door_tenant: str = ""
    """The tenant of a caller at the door, which is not shown a capability."""

    @property
    def tenant(self) -> str:
        """Return the tenant that the call is for; empty where a service speaks for itself."""
        return self.door_tenant if self.verified is None else self.verified.tenant


def who_calls(opened: Opened) -> dict[str, SpanValue]:
    """Return in whose name a call is, and by which chain of authority: claims, never a token."""
    verified = opened.verified
    if verified is None:
        named = {TENANT: opened.tenant, "octollm.peer": opened.peer}
        return {name: value for name, value in named.items() if value}
    told: dict[str, SpanValue] = {TENANT: verified.tenant, CHAIN: chain_of(verified.links)}
    if verified.task is not None:
        work = verified.task
        named = {TASK: work.task, "octollm.step": work.step, "octollm.attempt": work.attempt, "octollm.run": work.run}
        told |= {name: value for name, value in named.items() if value is not None}
    return told
