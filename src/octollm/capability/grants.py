"""Delegation trees: which calls may follow a call. Subset, intersection and union of trees, attenuation to what an operation declares, and the declared calls of the built-in services."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping
from types import MappingProxyType
from typing import cast

import msgspec

from octollm.capability.errors import CapabilityError
from octollm.capability.scopes import Scope, ScopeSet

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
        """Return the top-level entries and what stands under each."""
        return self._entries.items()

    def keys(self) -> KeysView[Scope]:
        """Return the top-level entries."""
        return self._entries.keys()

    def subtree(self, scope: Scope) -> DelegationTree | None:
        """Return what may follow a call of ``scope``; ``None`` when ``scope`` itself is not allowed.

        Where several entries allow it, that is what stands under any of them.
        """
        found: DelegationTree | None = None
        for entry, under in self._entries.items():
            if entry.contains(scope):
                found = under if found is None else union(found, under)
        return found

    @property
    def depth(self) -> int:
        """Return the number of levels: the hops left."""
        return 1 + max(under.depth for under in self._entries.values()) if self._entries else 0

    @property
    def size(self) -> int:
        """Return the number of entries of all levels."""
        return sum(1 + under.size for under in self._entries.values())

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
        return f"May({self.to_dict()!r})"


def parse_delegation_tree(value: object) -> DelegationTree:
    """Read a tree from nested dictionaries.

    Raises ``CapabilityError``: ``may_malformed`` for anything but dictionaries of scopes, ``may_too_large`` past
    :data:`MAX_DEPTH` levels or :data:`MAX_NODES` entries, ``scope_malformed`` for a malformed scope.
    """
    return _parse_tree(value, MAX_DEPTH, _NodeBudget(MAX_NODES))


class _NodeBudget:
    """Counts entries down while a tree is built, so that a large one is refused before it is whole."""

    def __init__(self, entries: int) -> None:
        self._left = entries

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise CapabilityError("may_too_large")


def _parse_tree(value: object, levels: int, allowance: _NodeBudget) -> DelegationTree:
    if not isinstance(value, dict):
        raise CapabilityError("may_malformed")
    members = cast("dict[object, object]", value)
    if members and levels == 0:
        raise CapabilityError("may_too_large")
    entries: dict[Scope, DelegationTree] = {}
    for key, under in members.items():
        allowance.take()
        if not isinstance(key, str):
            raise CapabilityError("may_malformed")
        entries[Scope(key)] = _parse_tree(under, levels - 1, allowance)
    return DelegationTree(entries)


def union(left: DelegationTree, right: DelegationTree) -> DelegationTree:
    """Return the tree of what either allows."""
    entries = dict(left.items())
    for scope, under in right.items():
        mine = entries.get(scope)
        entries[scope] = under if mine is None else union(mine, under)
    return DelegationTree(entries)


def contains(parent: DelegationTree, child: DelegationTree) -> bool:
    """Return whether every call path that ``child`` allows is allowed by ``parent``."""
    for scope, under in child.items():
        allowed = parent.subtree(scope)
        if allowed is None or not contains(allowed, under):
            return False
    return True


def intersect(parent: DelegationTree, wanted: DelegationTree) -> DelegationTree:
    """Return the tree of what both allow."""
    entries: dict[Scope, DelegationTree] = {}
    for scope, under in parent.items():
        for other, other_under in wanted.items():
            met = scope.intersection(other)
            if met is not None:
                both = intersect(under, other_under)
                entries[met] = union(entries[met], both) if met in entries else both
    return DelegationTree(entries)


class DeclaredCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A declared direct call. Without an ``optional`` one the operation still works."""

    scope: str
    optional: bool = False


Declarations = Mapping[str, tuple[DeclaredCall, ...]]
"""Operation scope (``coder:execute``) → the calls that it makes itself, not those of its callees."""


def attenuate(
    operation: str,
    declarations: Declarations,
    authority: ScopeSet,
    *,
    bindings: Mapping[str, tuple[str, ...]] | None = None,
    max_depth: int = DEFAULT_DEPTH,
) -> tuple[DelegationTree, list[str]]:
    """Return the tree of what may follow ``operation``, and which needed authority is missing.

    The tree is the closure of ``operation`` over ``declarations``, cut at every level by ``authority`` and at
    ``max_depth`` levels, so that declarations in a circle end. ``bind`` replaces a declared scope, wherever it
    stands, by narrower ones (``files:read`` by the digests of this task's files; by none: it is not granted).
    Missing are ``operation`` itself and each declared direct call that is not optional, where ``authority``
    allows no part of them. Raises ``CapabilityError``: ``scope_malformed`` for a malformed scope,
    ``may_too_large`` for a tree over its bounds, ``misuse`` for a binding that is not narrower or a bad depth.
    """
    if not 0 <= max_depth <= MAX_DEPTH:
        raise CapabilityError("misuse", f"max_depth is from 0 to {MAX_DEPTH}.")
    builder = _TreeBuilder(declarations, authority, bindings or {})
    root = Scope(operation)
    missing = dict.fromkeys([] if authority.allows(root) else [root.text])
    for call in builder.calls_of(root):
        bound = builder.bound(call.scope)
        if bound and not call.optional and not any(builder.allowed(scope) for scope in bound):
            missing[call.scope] = None
    return builder.tree(root, max_depth), list(missing)


class _TreeBuilder:
    """The inputs of one closure, parsed once, and the number of entries still to be had."""

    def __init__(self, declarations: Declarations, authority: ScopeSet, bind: Mapping[str, tuple[str, ...]]) -> None:
        self._declared = [(Scope(name), calls) for name, calls in declarations.items()]
        self._authority = authority
        self._bind = {Scope(name): tuple(Scope(text) for text in texts) for name, texts in bind.items()}
        if any(not wide.contains(scope) for wide, bound in self._bind.items() for scope in bound):
            raise CapabilityError("misuse", "A binding may only narrow the scope that it replaces.")
        self._left = MAX_NODES

    def calls_of(self, scope: Scope) -> Iterator[DeclaredCall]:
        """Yield the declared calls of every operation that a call of ``scope`` can reach."""
        for operation, calls in self._declared:
            if operation.contains(scope) or scope.contains(operation):
                yield from calls

    def bound(self, text: str) -> tuple[Scope, ...]:
        """Return the scopes that stand for a declared one."""
        scope = Scope(text)
        return self._bind.get(scope, (scope,))

    def allowed(self, scope: Scope) -> tuple[Scope, ...]:
        """Return what the authority allows of ``scope``."""
        return tuple(self._authority.intersection(ScopeSet((scope,))))

    def tree(self, operation: Scope, levels: int) -> DelegationTree:
        """Return what may follow ``operation`` within ``levels`` hops."""
        entries: dict[Scope, DelegationTree] = {}
        if levels == 0:
            return DelegationTree()
        for call in self.calls_of(operation):
            for bound in self.bound(call.scope):
                for scope in self.allowed(bound):
                    self._left -= 1
                    if self._left < 0:
                        raise CapabilityError("may_too_large")
                    under = self.tree(scope, levels - 1)
                    entries[scope] = union(entries[scope], under) if scope in entries else under
        return DelegationTree(entries)


def _required(scope: str) -> DeclaredCall:
    return DeclaredCall(scope)


def _optional(scope: str) -> DeclaredCall:
    return DeclaredCall(scope, optional=True)


BUILT_IN_CALLS: Declarations = MappingProxyType(
    {
        "planner:plan": (_required("models:chat"),),
        "planner:execute": (_required("models:chat"), _required("executor:run")),
        "coder:execute": (
            _required("models:chat"),
            _required("judge:validate"),
            _required("executor:run"),
            _optional("files:read"),
            _required("files:write"),
        ),
        "judge:validate": (_optional("executor:run"),),
        "judge:accept": (_optional("executor:run"), _optional("files:read"), _optional("models:chat")),
        "judge:execute": (_optional("executor:run"), _optional("files:read")),
        "retriever:search": (_required("memory:read"),),
        "retriever:execute": (_required("memory:read"), _required("models:chat")),
        "executor:execute": (_optional("files:read"), _optional("files:write")),
        "executor:run": (_optional("files:read"),),
        "executor:http": (),
        "memory:read": (),
        "memory:write": (),
        "models:chat": (),
        "models:embeddings": (),
        "files:read": (),
        "files:write": (),
    }
)
"""The direct calls of the built-in services. An operation that is not here calls nothing."""
