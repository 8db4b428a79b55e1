"""Whom work is done for, and what the presets let them do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from octollm.capability.problems import CapabilityError
from octollm.capability.scopes import Scope, ScopeSet
from octollm.contracts.services import BUILT_IN_ARMS


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asked: the person or account (``sub``), with which of its credentials, in which tenant.

    Each is 1 to 255 printable ASCII characters without spaces.
    """

    sub: str
    cred: str
    tenant: str


_USER_SCOPES = ("tasks:*", "files:*", "memory:*", "models:*", "events:read")
_ADMIN_SCOPES = (*_USER_SCOPES, "webhooks:*", "keys:*", "audit:read", "arms:*")

PRESETS: dict[str, tuple[str, ...]] = {"user": _USER_SCOPES, "admin": _ADMIN_SCOPES}
"""Scopes of each preset, besides ``<arm>:*`` for every arm that is admitted for the tenant.

| scope | user | admin | lets its holder |
|---|---|---|---|
| ``tasks:*`` | yes | yes | submit, read, cancel and approve tasks |
| ``files:*`` | yes | yes | store and read files |
| ``memory:*`` | yes | yes | read and write facts and documents |
| ``models:*`` | yes | yes | have models called, within a budget |
| ``events:read`` | yes | yes | follow the tenant's events |
| ``<arm>:*`` | yes | yes | have the operations of an admitted arm called |
| ``webhooks:*`` | no | yes | manage webhooks |
| ``keys:*`` | no | yes | make and revoke API keys |
| ``audit:read`` | no | yes | read the audit log |
| ``arms:*`` | no | yes | admit and remove arms |
"""


def preset_scopes(name: str, arms: Iterable[str] = BUILT_IN_ARMS) -> ScopeSet:
    """Return the scopes of the preset ``name`` in a tenant that admits ``arms``.

    Raises ``CapabilityError``: ``misuse`` if there is no such preset, ``scope_malformed`` for a malformed arm name.
    """
    if name not in PRESETS:
        raise CapabilityError("misuse", f"There is no preset of that name; there are {', '.join(PRESETS)}.")
    return ScopeSet([*(Scope(text) for text in PRESETS[name]), *(Scope(f"{arm}:*") for arm in arms)])
