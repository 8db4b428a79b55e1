"""Scopes and sets of scopes, with containment and intersection; principals, and the presets ``user`` and ``admin``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from octollm.capability.errors import CapabilityError
from octollm.contracts.services import BUILT_IN_ARMS, service_of

MAX_SCOPE_CHARS = 256
"""Most characters of one scope."""
MAX_SEGMENTS = 8
"""Most segments of one scope, including the service."""
MAX_SCOPES = 256
"""Most scopes of one set."""
MAX_SET_CHARS = 8_192
"""Most characters of the text of one set."""

_SEGMENT = r"[a-z0-9._-]+"
_GRAMMAR = re.compile(rf"{_SEGMENT}(?::{_SEGMENT})*:(?:{_SEGMENT}|\*)")


@dataclass(frozen=True, slots=True)
class Scope:
    """One well-formed scope. Raises ``CapabilityError`` (``scope_malformed``) for any other text."""

    text: str
    _prefix: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        text = self.text
        if len(text) > MAX_SCOPE_CHARS or text.count(":") >= MAX_SEGMENTS or _GRAMMAR.fullmatch(text) is None:
            raise CapabilityError("scope_malformed")
        # No segment contains a colon, so a text prefix that ends in one is a prefix of whole segments.
        object.__setattr__(self, "_prefix", text[:-1] if text.endswith("*") else text + ":")

    @property
    def family(self) -> str:
        """The first segment: the service, or a family that a service owns."""
        return self.text.partition(":")[0]

    @property
    def operation(self) -> str:
        """The first two segments, such as ``files:read`` of ``files:read:0a1b``."""
        return ":".join(self.text.split(":", 2)[:2])

    def contains(self, other: Scope) -> bool:
        """Return whether every request that ``other`` allows is allowed by this scope."""
        return other.text == self.text or other.text.startswith(self._prefix)

    def intersection(self, other: Scope) -> Scope | None:
        """Return the scope that both contain, or ``None``: of two scopes that overlap, one contains the other."""
        if self.contains(other):
            return other
        return self if other.contains(self) else None

    def __str__(self) -> str:
        return self.text


def parse_scope(text: str) -> Scope:
    """Parse a scope; raises ``CapabilityError`` (``scope_malformed``) and never normalizes."""
    return Scope(text)


class ScopeSet:
    """An immutable set of scopes. It allows what any of its members allows; the empty set allows nothing.

    Two sets with the same members are equal. The text keeps the order of the members.
    """

    __slots__ = ("_scopes",)

    def __init__(self, scopes: Iterable[Scope] = ()) -> None:
        self._scopes = tuple(dict.fromkeys(scopes))

    @classmethod
    def parse(cls, text: str) -> ScopeSet:
        """Parse scopes separated by single spaces (RFC 6749 section 3.3); the empty text is the empty set.

        Raises ``CapabilityError`` (``scope_malformed``) if any of them is malformed, or there are too many.
        """
        if text == "":
            return cls()
        if len(text) > MAX_SET_CHARS or text.count(" ") >= MAX_SCOPES:
            raise CapabilityError("scope_malformed")
        return cls(Scope(part) for part in text.split(" "))

    def allows(self, required: str | Scope) -> bool:
        """Return whether one member contains ``required``; a malformed ``required`` raises."""
        scope = required if isinstance(required, Scope) else Scope(required)
        return any(own.contains(scope) for own in self._scopes)

    def intersection(self, other: ScopeSet) -> ScopeSet:
        """Return the set of the scopes that both sets allow."""
        common = (left.intersection(right) for left in self._scopes for right in other._scopes)
        return ScopeSet(scope for scope in common if scope is not None)

    def owned_by(self, service: str) -> ScopeSet:
        """Return the members that a token for ``service`` may carry: those of the families that it owns."""
        return ScopeSet(scope for scope in self._scopes if service_of(scope.family) == service)

    def is_subset(self, other: ScopeSet) -> bool:
        """Return whether ``other`` allows everything that this set allows."""
        return all(other.allows(scope) for scope in self._scopes)

    def __iter__(self) -> Iterator[Scope]:
        return iter(self._scopes)

    def __len__(self) -> int:
        return len(self._scopes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScopeSet) and set(self._scopes) == set(other._scopes)

    def __hash__(self) -> int:
        return hash(frozenset(self._scopes))

    def __str__(self) -> str:
        return " ".join(scope.text for scope in self._scopes)

    def __repr__(self) -> str:
        return f"ScopeSet({str(self)!r})"


@dataclass(frozen=True, slots=True)
class Principal:
    """The person or account (``sub``) that the work is for, the credential that it used, and its tenant.

    Each is 1 to 255 printable ASCII characters without spaces.
    """

    sub: str
    cred: str
    tenant: str


_USER_SCOPES = ("tasks:*", "files:*", "memory:*", "models:*", "events:read", "events:subscribe")
_ADMIN_SCOPES = (*_USER_SCOPES, "webhooks:*", "keys:*", "audit:read", "arms:*", "monitor:read")

PRESETS: dict[str, tuple[str, ...]] = {"user": _USER_SCOPES, "admin": _ADMIN_SCOPES}
"""Scopes of each preset, besides ``<arm>:*`` for every arm that is admitted for the tenant.

| scope | user | admin | lets its holder |
|---|---|---|---|
| ``tasks:*`` | yes | yes | submit, read, steer, cancel and approve tasks |
| ``files:*`` | yes | yes | store and read files |
| ``memory:*`` | yes | yes | read, write and erase facts and documents |
| ``models:*`` | yes | yes | have models called, within a budget |
| ``events:read`` | yes | yes | follow the tenant's events |
| ``events:subscribe`` | yes | yes | keep durable subscriptions; ``events:subscribe:billing`` is for one |
| ``<arm>:*`` | yes | yes | have the operations of an admitted arm called |
| ``webhooks:*`` | no | yes | manage webhooks |
| ``keys:*`` | no | yes | make and revoke API keys |
| ``audit:read`` | no | yes | read the audit log |
| ``arms:*`` | no | yes | admit and remove arms |
| ``monitor:read`` | no | yes | read the state of the services |
"""


def preset_scopes(name: str, arms: Iterable[str] = BUILT_IN_ARMS) -> ScopeSet:
    """Return the scopes of the preset ``name`` in a tenant that admits ``arms``.

    Raises ``CapabilityError``: ``misuse`` for an unknown preset, ``scope_malformed`` for a malformed arm name.
    """
    if name not in PRESETS:
        raise CapabilityError("misuse", f"There is no preset of that name; there are {', '.join(PRESETS)}.")
    return ScopeSet([*(Scope(text) for text in PRESETS[name]), *(Scope(f"{arm}:*") for arm in arms)])
