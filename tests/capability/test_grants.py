"""Trees of authority, against the sets of call paths that they denote."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.capability import (
    CapabilityError,
    DeclaredCall,
    DelegationTree,
    ScopeSet,
    attenuate,
    contains,
    intersect,
    parse_delegation_tree,
    parse_scope,
    union,
)
from octollm.capability.grants import MAX_DEPTH, MAX_NODES

# The model: a tree is the set of call paths that it allows, over requests of the letters a and z, where z stands
# for every name that no scope has.
_REQUESTS = [":".join(("s", *rest)) for length in (1, 2, 3) for rest in product("az", repeat=length)]
_SCOPES = ["s:a", "s:*", "s:a:*", "s:a:a"]

Tree = dict[str, Any]
Paths = frozenset[tuple[str, ...]]


def allows(scope: str, request: str) -> bool:
    wanted, parts = scope.split(":"), request.split(":")
    if wanted[-1] == "*":
        return len(parts) >= len(wanted) and parts[: len(wanted) - 1] == wanted[:-1]
    return parts[: len(wanted)] == wanted


def paths(tree: Tree) -> Paths:
    found: set[tuple[str, ...]] = set()
    for scope, under in tree.items():
        rest = paths(under)
        for request in _REQUESTS:
            if allows(scope, request):
                found.add((request,))
                found.update((request, *path) for path in rest)
    return frozenset(found)


_leaf: st.SearchStrategy[Tree] = st.just({})


def _level(below: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.dictionaries(st.sampled_from(_SCOPES), below, max_size=3)


_trees = _level(_level(_level(_leaf)))


@given(_trees, _trees)
def test_containment_is_the_subset_relation(left: Tree, right: Tree) -> None:
    assert contains(parse_delegation_tree(left), parse_delegation_tree(right)) == (paths(left) >= paths(right))


@given(_trees, _trees)
def test_narrow_is_the_intersection(left: Tree, right: Tree) -> None:
    both = intersect(parse_delegation_tree(left), parse_delegation_tree(right))
    assert paths(both.to_dict()) == paths(left) & paths(right)
    assert contains(parse_delegation_tree(left), both)
    assert contains(parse_delegation_tree(right), both)


@given(_trees, _trees)
def test_merge_is_the_union(left: Tree, right: Tree) -> None:
    assert paths(union(parse_delegation_tree(left), parse_delegation_tree(right)).to_dict()) == paths(left) | paths(
        right
    )


@given(_trees, st.sampled_from(_REQUESTS))
def test_below_is_what_may_follow(tree: Tree, request: str) -> None:
    below = parse_delegation_tree(tree).subtree(parse_scope(request))
    following = {path[1:] for path in paths(tree) if path[0] == request}
    if below is None:
        assert not following
    else:
        assert paths(below.to_dict()) == following - {()}
        assert () in following


@given(_trees)
def test_the_object_of_a_tree_is_that_tree(tree: Tree) -> None:
    may = parse_delegation_tree(tree)
    assert may.to_dict() == tree
    assert parse_delegation_tree(may.to_dict()) == may
    assert hash(parse_delegation_tree(tree)) == hash(may)


def test_height_and_size() -> None:
    may = parse_delegation_tree({"judge:validate": {"executor:run": {}}, "models:chat": {}})
    assert (may.depth, may.size, len(may)) == (2, 3, 2)
    assert (DelegationTree().depth, DelegationTree().size, bool(DelegationTree())) == (0, 0, False)


def test_selectors_narrow_an_entry() -> None:
    may = parse_delegation_tree({"files:read": {}})
    assert may.subtree(parse_scope("files:read:0a")) == DelegationTree()
    narrower = parse_delegation_tree({"files:read:0a": {}})
    assert narrower.subtree(parse_scope("files:read:0a")) == DelegationTree()
    assert narrower.subtree(parse_scope("files:read:0b")) is None
    assert narrower.subtree(parse_scope("files:read")) is None


def _chain(levels: int) -> Tree:
    tree: Tree = {}
    for _ in range(levels):
        tree = {"a:b": tree}
    return tree


@pytest.mark.parametrize("value", [None, [], "a:b", 1, {"a:b": None}, {"a:b": []}, {"a:b": {"c:d": 1}}, {1: {}}])
def test_malformed_trees_are_refused(value: object) -> None:
    with pytest.raises(CapabilityError) as caught:
        parse_delegation_tree(value)
    assert caught.value.reason == "may_malformed"


def test_a_malformed_scope_anywhere_is_refused() -> None:
    with pytest.raises(CapabilityError) as caught:
        parse_delegation_tree({"a:b": {"c": {}}})
    assert caught.value.reason == "scope_malformed"


def test_trees_are_bounded() -> None:
    assert parse_delegation_tree(_chain(MAX_DEPTH)).depth == MAX_DEPTH
    assert parse_delegation_tree({f"a:b{n}": {} for n in range(MAX_NODES)}).size == MAX_NODES
    deep = _chain(5_000)
    for value in (_chain(MAX_DEPTH + 1), deep, {f"a:b{n}": {} for n in range(MAX_NODES + 1)}):
        with pytest.raises(CapabilityError) as caught:
            parse_delegation_tree(value)
        assert caught.value.reason == "may_too_large"


# The closure of declarations.

_OPERATIONS = ["s:a", "s:z", "t:a"]
_declarations = st.dictionaries(
    st.sampled_from(_OPERATIONS), st.lists(st.sampled_from(_OPERATIONS), max_size=2, unique=True), max_size=3
)
_authority = st.lists(st.sampled_from([*_OPERATIONS, "s:*"]), max_size=3, unique=True)


def declared_paths(
    operation: str, declared: dict[str, list[str]], authority: list[str], levels: int
) -> set[tuple[str, ...]]:
    """Walk the declarations call by call."""
    found: set[tuple[str, ...]] = set()
    if levels:
        for callee in declared.get(operation, []):
            if any(allows(scope, callee) for scope in authority):
                found.add((callee,))
                rest = declared_paths(callee, declared, authority, levels - 1)
                found.update((callee, *path) for path in rest)
    return found


def tree_paths(tree: Tree) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for scope, under in tree.items():
        found.add((scope,))
        found.update((scope, *path) for path in tree_paths(under))
    return found


@given(st.sampled_from(_OPERATIONS), _declarations, _authority, st.integers(0, 4))
def test_closure_allows_the_declared_paths_within_authority(
    operation: str, declared: dict[str, list[str]], authority: list[str], levels: int
) -> None:
    calls = {name: tuple(DeclaredCall(scope) for scope in scopes) for name, scopes in declared.items()}
    held = ScopeSet.parse(" ".join(authority))
    may, missing = attenuate(operation, calls, held, max_depth=levels)
    assert tree_paths(may.to_dict()) == declared_paths(operation, declared, authority, levels)
    needed = [operation, *declared.get(operation, [])]
    assert set(missing) == {scope for scope in needed if not held.allows(scope)}
    assert len(missing) == len(set(missing))


def test_an_optional_call_is_never_missing() -> None:
    declared = {"coder:execute": (DeclaredCall("models:chat"), DeclaredCall("files:read", optional=True))}
    may, missing = attenuate("coder:execute", declared, ScopeSet.parse("coder:*"))
    assert not may
    assert missing == ["models:chat"]


def test_authority_narrows_entries() -> None:
    declared = {"coder:execute": (DeclaredCall("files:read"),)}
    may, missing = attenuate("coder:execute", declared, ScopeSet.parse("coder:* files:read:0a files:read:0b"))
    assert may.to_dict() == {"files:read:0a": {}, "files:read:0b": {}}
    assert missing == []


def test_a_binding_narrows_at_every_level() -> None:
    declared = {
        "coder:execute": (DeclaredCall("executor:run"), DeclaredCall("files:read", optional=True)),
        "executor:run": (DeclaredCall("files:read", optional=True),),
    }
    held = ScopeSet.parse("coder:* executor:* files:*")
    may, _ = attenuate("coder:execute", declared, held, bindings={"files:read": ("files:read:0a", "files:read:0b")})
    digests: Tree = {"files:read:0a": {}, "files:read:0b": {}}
    assert may.to_dict() == {"executor:run": digests, **digests}
    may, missing = attenuate("coder:execute", declared, held, bindings={"files:read": ()})
    assert may.to_dict() == {"executor:run": {}}
    assert missing == []


def test_a_binding_cannot_widen() -> None:
    declared = {"coder:execute": (DeclaredCall("files:read:0a"),)}
    for wide in ("files:read", "files:*", "models:chat"):
        with pytest.raises(CapabilityError) as caught:
            attenuate("coder:execute", declared, ScopeSet.parse("files:*"), bindings={"files:read:0a": (wide,)})
        assert caught.value.reason == "misuse"


def test_a_call_with_a_selector_follows_its_operation() -> None:
    declared = {"a:x": (DeclaredCall("b:y:sel"),), "b:y": (DeclaredCall("c:z"),)}
    may, _ = attenuate("a:x", declared, ScopeSet.parse("a:* b:* c:*"))
    assert may.to_dict() == {"b:y:sel": {"c:z": {}}}


def test_a_wildcard_is_followed_by_the_calls_of_all_that_it_covers() -> None:
    declared = {"a:x": (DeclaredCall("b:*"),), "b:y": (DeclaredCall("c:z"),), "b:w": (DeclaredCall("d:z"),)}
    may, _ = attenuate("a:x", declared, ScopeSet.parse("a:* b:* c:* d:*"))
    assert may.to_dict() == {"b:*": {"c:z": {}, "d:z": {}}}


def test_circles_end_and_explosions_are_refused() -> None:
    circle = {"a:x": (DeclaredCall("b:x"),), "b:x": (DeclaredCall("a:x"),)}
    may, _ = attenuate("a:x", circle, ScopeSet.parse("a:* b:*"))
    assert may.depth == 4
    names = [f"a:n{n}" for n in range(12)]
    everyone = {name: tuple(DeclaredCall(other) for other in names) for name in names}
    with pytest.raises(CapabilityError) as caught:
        attenuate("a:n0", everyone, ScopeSet.parse("a:*"))
    assert caught.value.reason == "may_too_large"


def test_a_depth_that_no_bearer_string_can_carry_is_refused() -> None:
    with pytest.raises(CapabilityError):
        attenuate("a:x", {}, ScopeSet(), max_depth=MAX_DEPTH + 1)
