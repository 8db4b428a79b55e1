"""Delegation trees: which calls may follow a call.

Subset, intersection and union of trees, attenuation to the declared calls of an operation, and the declared calls of
the built-in services.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping
from types import MappingProxyType
from typing import cast

import msgspec

from octollm.capability.errors import CapabilityError
from octollm.capability.scopes import Scope, ScopeSet
from octollm.contracts.declarations import OPTIONAL_MARK
from octollm.contracts.service_operations import SERVICE_OPERATIONS

MAX_DEPTH = 6
"""Levels of a tree: with the access token and the grant for the callee, a chain of six hops has eight parts."""
MAX_NODES = 256
"""Entries of a tree, all levels together."""
DEFAULT_DEPTH = 4
"""Hops that follow an operation at most, unless a caller says otherwise."""


class DelegationTree:
    """An immutable tree of scopes; the empty tree, which is false, allows nothing."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[Scope, DelegationTree] | None = None) -> None:
        self._entries = dict(entries or {})

    def items(self) -> ItemsView[Scope, DelegationTree]:
        """Return the top-level entries, each with its subtree."""
        return self._entries.items()

    def keys(self) -> KeysView[Scope]:
        """Return the top-level entries."""
        return self._entries.keys()

    def subtree(self, scope: Scope) -> DelegationTree | None:
        """Return the calls that may follow a call of ``scope``; ``None`` when ``scope`` itself is not allowed.

        When several entries allow it, that is the union of their subtrees.
        """
        allowed: DelegationTree | None = None
        for entry, under in self._entries.items():
            if entry.contains(scope):
                allowed = under if allowed is None else union(allowed, under)
        return allowed

    @property
    def depth(self) -> int:
        """The number of levels: the hops that may follow."""
        return 1 + max(under.depth for under in self._entries.values()) if self._entries else 0

    @property
    def size(self) -> int:
        """The number of entries of all levels."""
        return sum(1 + under.size for under in self._entries.values())

    def scopes(self) -> ScopeSet:
        """Return the scopes of all levels."""
        below = (scope for under in self._entries.values() for scope in under.scopes())
        return ScopeSet((*self._entries, *below))

    def to_dict(self) -> dict[str, object]:
        """Return the tree as nested dictionaries of text, the form of the ``may`` claim."""
        return {scope.text: under.to_dict() for scope, under in self._entries.items()}

    def __iter__(self) -> Iterator[Scope]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DelegationTree) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return f"DelegationTree({self.to_dict()!r})"


def parse_delegation_tree(value: object) -> DelegationTree:
    """Parse a tree from nested dictionaries.

    Raises ``CapabilityError``: ``may_malformed`` for anything but dictionaries of scopes, ``may_too_large`` past
    :data:`MAX_DEPTH` levels or :data:`MAX_NODES` entries, ``scope_malformed`` for a malformed scope.
    """
    return _parse_tree(value, MAX_DEPTH, _NodeBudget(MAX_NODES))


class _NodeBudget:
    """Counts entries down while a tree is parsed, so that a large one is refused before all of it is built."""

    def __init__(self, entries: int) -> None:
        self._remaining = entries

    def take(self) -> None:
        self._remaining -= 1
        if self._remaining < 0:
            raise CapabilityError("may_too_large")


def _parse_tree(value: object, levels: int, budget: _NodeBudget) -> DelegationTree:
    if not isinstance(value, dict):
        raise CapabilityError("may_malformed")
    members = cast("dict[object, object]", value)
    if members and levels == 0:
        raise CapabilityError("may_too_large")
    entries: dict[Scope, DelegationTree] = {}
    for key, under in members.items():
        budget.take()
        if not isinstance(key, str):
            raise CapabilityError("may_malformed")
        entries[Scope(key)] = _parse_tree(under, levels - 1, budget)
    return DelegationTree(entries)


def union(left: DelegationTree, right: DelegationTree) -> DelegationTree:
    """Return the tree of the calls that either tree allows."""
    entries = dict(left.items())
    for scope, under in right.items():
        present = entries.get(scope)
        entries[scope] = under if present is None else union(present, under)
    return DelegationTree(entries)


def contains(parent: DelegationTree, child: DelegationTree) -> bool:
    """Return whether every call path that ``child`` allows is allowed by ``parent``."""
    for scope, under in child.items():
        allowed = parent.subtree(scope)
        if allowed is None or not contains(allowed, under):
            return False
    return True


def intersect(left: DelegationTree, right: DelegationTree) -> DelegationTree:
    """Return the tree of the calls that both trees allow."""
    entries: dict[Scope, DelegationTree] = {}
    for scope, under in left.items():
        # Every pair, because scopes overlap: an operation may match a wildcard of the other side.
        for other, other_under in right.items():
            common = scope.intersection(other)
            if common is not None:
                both = intersect(under, other_under)
                entries[common] = union(entries[common], both) if common in entries else both
    return DelegationTree(entries)


class DeclaredCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A declared direct call; the operation works without an ``optional`` one."""

    scope: str
    optional: bool = False


Declarations = Mapping[str, tuple[DeclaredCall, ...]]
"""The direct calls of each operation scope (``coder:execute``), without those of its callees."""


def attenuate(
    operation: str,
    declarations: Declarations,
    authority: ScopeSet,
    *,
    bindings: Mapping[str, tuple[str, ...]] | None = None,
    max_depth: int = DEFAULT_DEPTH,
) -> tuple[DelegationTree, list[str]]:
    """Return the tree of the calls that may follow ``operation``, and the required scopes that are missing.

    The tree is the closure of ``operation`` over ``declarations``, intersected with ``authority`` at every level and
    cut at ``max_depth`` levels, so that circular declarations end. ``bindings`` replaces a declared scope, at any
    level, by narrower ones (``files:read`` by the digests of this task's files; by none to withhold it). Missing are
    ``operation`` itself and each required direct call of which ``authority`` allows no part. Raises
    ``CapabilityError``: ``scope_malformed`` for a malformed scope, ``may_too_large`` for a tree over its limits,
    ``misuse`` for a binding that is not narrower or a bad depth.
    """
    if not 0 <= max_depth <= MAX_DEPTH:
        raise CapabilityError("misuse", f"max_depth is from 0 to {MAX_DEPTH}.")
    builder = _TreeBuilder(declarations, authority, bindings or {})
    root = Scope(operation)
    missing = dict.fromkeys([] if authority.allows(root) else [root.text])
    for call in builder.calls_of(root):
        bound = builder.bound(call.scope)
        # Bound to nothing means withheld on purpose, which is not the same as missing.
        if bound and not call.optional and not any(builder.allowed(scope) for scope in bound):
            missing[call.scope] = None
    return builder.tree(root, max_depth), list(missing)


class _TreeBuilder:
    """The parsed inputs of one closure, and the number of entries that it may still add."""

    def __init__(
        self, declarations: Declarations, authority: ScopeSet, bindings: Mapping[str, tuple[str, ...]]
    ) -> None:
        self._declared = [(Scope(name), calls) for name, calls in declarations.items()]
        self._authority = authority
        self._bindings = {Scope(name): tuple(Scope(text) for text in texts) for name, texts in bindings.items()}
        if any(not wide.contains(scope) for wide, bound in self._bindings.items() for scope in bound):
            raise CapabilityError("misuse", "A binding may only narrow the scope that it replaces.")
        self._budget = _NodeBudget(MAX_NODES)

    def calls_of(self, scope: Scope) -> Iterator[DeclaredCall]:
        """Yield the declared calls of every operation that a call of ``scope`` can reach."""
        for operation, calls in self._declared:
            # Both directions: a wildcard reaches every operation below it, so it needs the calls of all of them.
            if operation.contains(scope) or scope.contains(operation):
                yield from calls

    def bound(self, text: str) -> tuple[Scope, ...]:
        """Return the scopes that replace a declared one."""
        scope = Scope(text)
        return self._bindings.get(scope, (scope,))

    def allowed(self, scope: Scope) -> tuple[Scope, ...]:
        """Return the part of ``scope`` that the authority allows."""
        return tuple(self._authority.intersection(ScopeSet((scope,))))

    def tree(self, operation: Scope, levels: int) -> DelegationTree:
        """Return the calls that may follow ``operation`` within ``levels`` hops."""
        entries: dict[Scope, DelegationTree] = {}
        if levels == 0:
            return DelegationTree()
        for call in self.calls_of(operation):
            for bound in self.bound(call.scope):
                for scope in self.allowed(bound):
                    self._budget.take()
                    under = self.tree(scope, levels - 1)
                    entries[scope] = union(entries[scope], under) if scope in entries else under
        return DelegationTree(entries)


def _parse_calls(calls: Iterable[str]) -> tuple[DeclaredCall, ...]:
    return tuple(DeclaredCall(call.removeprefix(OPTIONAL_MARK), call.startswith(OPTIONAL_MARK)) for call in calls)


BUILT_IN_CALLS: Declarations = MappingProxyType(
    {declared.id: _parse_calls(declared.calls) for declared in SERVICE_OPERATIONS}
)
"""The direct calls of the built-in services. An operation that is not listed calls nothing."""
