"""The capability chain of a call as attributes of its span: who passed which authority on to whom.

Only claims are told, never a token: what is in a trace opens nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octollm.capability.tokens import AccessClaims, Claims, GrantClaims
from octollm.telemetry.spans import SpanValue


def chain_attributes(links: Sequence[Claims]) -> dict[str, SpanValue]:
    """Return ``iss``, ``aud``, ``scope`` and ``jti`` of every link, the root's first and the access token last.

    ``links`` are in the order of a bearer string: the access token, then the grants. A grant's scope is its tree of
    what may follow, as JSON.
    """
    ordered = [*links[1:], *links[:1]]
    return {
        "octollm.chain.iss": tuple(link.iss for link in ordered),
        "octollm.chain.aud": tuple(link.aud for link in ordered),
        "octollm.chain.scope": tuple(_scope_of(link) for link in ordered),
        "octollm.chain.jti": tuple(link.jti for link in ordered),
    }


def _scope_of(link: Claims) -> str:
    if isinstance(link, GrantClaims):
        return msgspec.json.encode(link.may.to_object()).decode()
    return str(link.scope) if isinstance(link, AccessClaims) else ""
