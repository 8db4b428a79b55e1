"""The capability chain of a call as an attribute of its span: who passed which authority on to whom.

Only claims are told, never a token: what is in a trace opens nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octollm.capability.tokens import AccessClaims, GrantClaims, TokenClaims

CHAIN_ATTRIBUTE = "octollm.chain"


class ChainLink(msgspec.Struct, frozen=True):
    """One link: ``iss`` let ``aud`` do ``scope``. A grant's scope is its tree of what may follow, as JSON."""

    iss: str
    aud: str
    scope: str
    jti: str


def encode_chain(links: Sequence[TokenClaims]) -> tuple[str, ...]:
    """Return every link as JSON, the root's first and the access token last.

    ``links`` are in the order of a bearer string: the access token, then the grants.
    """
    ordered = (*links[1:], links[0])
    return tuple(
        [msgspec.json.encode(ChainLink(link.iss, link.aud, _link_scope(link), link.jti)).decode() for link in ordered]
    )


def _link_scope(link: TokenClaims) -> str:
    if isinstance(link, GrantClaims):
        return msgspec.json.encode(link.may.to_dict()).decode()
    return str(link.scope) if isinstance(link, AccessClaims) else ""
