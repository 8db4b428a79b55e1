"""The capability chain of a call as an attribute of its span: who passed which authority on to whom.

Only claims are told, never a token: what is in a trace opens nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octollm.capability.tokens import AccessClaims, Claims, GrantClaims

CHAIN = "octollm.chain"


class Link(msgspec.Struct, frozen=True):
    """One link: ``iss`` let ``aud`` do ``scope``. A grant's scope is its tree of what may follow, as JSON."""

    iss: str
    aud: str
    scope: str
    jti: str


def chain_of(links: Sequence[Claims]) -> tuple[str, ...]:
    """Return every link as JSON, the root's first and the access token last.

    ``links`` are in the order of a bearer string: the access token, then the grants.
    """
    ordered = (*links[1:], links[0])
    return tuple(
        [msgspec.json.encode(Link(link.iss, link.aud, _scope_of(link), link.jti)).decode() for link in ordered]
    )


def _scope_of(link: Claims) -> str:
    if isinstance(link, GrantClaims):
        return msgspec.json.encode(link.may.to_object()).decode()
    return str(link.scope) if isinstance(link, AccessClaims) else ""
