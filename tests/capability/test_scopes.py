"""The scope algebra, against the sets of requests that scopes denote."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.capability import CapabilityError, Scope, ScopeSet, parse_scope
from octollm.capability.scopes import MAX_SCOPE_CHARS, MAX_SCOPES, MAX_SEGMENTS

# The model: a scope is the set of requests that it allows. Scopes are made of the letters a and b; requests of a,
# b and z, since a letter that no scope names stands for all the others, and are longer than any scope.
_LETTERS = "abz"
_UNIVERSE = [
    (service, *rest) for service in "st" for length in (1, 2, 3, 4) for rest in product(_LETTERS, repeat=length)
]


def denoted(text: str) -> frozenset[tuple[str, ...]]:
    segments = text.split(":")
    if segments[-1] == "*":
        head = tuple(segments[:-1])
        return frozenset(r for r in _UNIVERSE if len(r) > len(head) and r[: len(head)] == head)
    head = tuple(segments)
    return frozenset(r for r in _UNIVERSE if r[: len(head)] == head)


def denotation(scopes: ScopeSet) -> frozenset[tuple[str, ...]]:
    return frozenset().union(*(denoted(scope.text) for scope in scopes))


_segments = st.lists(st.sampled_from("ab"), min_size=1, max_size=2)
_texts = st.builds(
    lambda service, rest, star: ":".join([service, *rest, *star]),
    st.sampled_from("st"),
    _segments,
    st.sampled_from([[], ["*"]]),
) | st.sampled_from(["s:*", "t:*"])
_sets = st.lists(_texts, max_size=4).map(lambda texts: ScopeSet.parse(" ".join(texts)))


@given(_texts, _texts)
def test_containment_is_the_subset_relation(left: str, right: str) -> None:
    assert Scope(left).contains(Scope(right)) == (denoted(left) >= denoted(right))


@given(_texts, _texts)
def test_meet_is_the_intersection(left: str, right: str) -> None:
    met = Scope(left).intersection(Scope(right))
    assert (frozenset() if met is None else denoted(met.text)) == denoted(left) & denoted(right)


@given(_sets, _texts)
def test_a_set_allows_what_its_members_allow(scopes: ScopeSet, required: str) -> None:
    assert scopes.allows(required) == (denotation(scopes) >= denoted(required))


@given(_sets, _sets)
def test_intersection_of_sets(left: ScopeSet, right: ScopeSet) -> None:
    both = left.intersection(right)
    assert denotation(both) == denotation(left) & denotation(right)
    assert both.is_subset(left)
    assert both.is_subset(right)


@given(_sets, _sets)
def test_narrower_is_the_subset_relation(left: ScopeSet, right: ScopeSet) -> None:
    assert left.is_subset(right) == (denotation(left) <= denotation(right))


@given(_sets)
def test_the_text_of_a_set_is_that_set(scopes: ScopeSet) -> None:
    assert ScopeSet.parse(str(scopes)) == scopes


@pytest.mark.parametrize(
    ("wide", "narrow", "holds"),
    [
        ("memory:read", "memory:read:task.x", True),
        ("memory:read", "memory:readall", False),
        ("memory:read:task.x", "memory:read", False),
        ("a:*", "a:x", True),
        ("a:*", "a:x:y", True),
        ("a:*", "a:*", True),
        ("a:*", "a:x:*", True),
        ("a:x", "a:x:*", True),
        ("a:x:*", "a:x", False),
        ("a:x:*", "a:x:y:z", True),
        ("a:*", "ab:x", False),
        ("a:x", "a:xy", False),
    ],
)
def test_examples(wide: str, narrow: str, holds: bool) -> None:
    assert parse_scope(wide).contains(parse_scope(narrow)) is holds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "a",
        "a:",
        ":a",
        "a::b",
        "a:b:",
        "*:a",
        "*:*",
        "a:*:b",
        "a:b*",
        "a:**",
        "a:*b",
        "A:b",
        "a:B",
        "a: b",
        " a:b",
        "a:b ",
        "a:b\n",
        "a:b\tc",
        "a:b/c",
        "a:é",
        "a:\u0430",
        "a:b\x00",
        "a:b%2a",
        "a:" + "b" * MAX_SCOPE_CHARS,
        ":".join("a" * (MAX_SEGMENTS + 1)),
    ],
)
def test_malformed_is_refused(text: str) -> None:
    with pytest.raises(CapabilityError) as caught:
        parse_scope(text)
    assert caught.value.reason == "scope_malformed"
    with pytest.raises(CapabilityError):
        ScopeSet.parse("a:b").allows(text)
    if text:
        with pytest.raises(CapabilityError):
            ScopeSet.parse(f"a:b {text}")


@given(st.text(alphabet="ab:* .\n", max_size=8))
def test_what_is_accepted_is_kept_letter_by_letter(text: str) -> None:
    try:
        scope = parse_scope(text)
    except CapabilityError:
        return
    assert str(scope) == text


@pytest.mark.parametrize("text", ["a:b  c:d", " a:b", "a:b ", "a:b\tc:d", "a:b,c:d", " "])
def test_malformed_sets_are_refused(text: str) -> None:
    with pytest.raises(CapabilityError):
        ScopeSet.parse(text)


def test_sets_are_bounded() -> None:
    ScopeSet.parse(" ".join(f"a:b{n}" for n in range(MAX_SCOPES)))
    with pytest.raises(CapabilityError):
        ScopeSet.parse(" ".join(f"a:b{n}" for n in range(MAX_SCOPES + 1)))
    with pytest.raises(CapabilityError):
        ScopeSet.parse(" ".join(f"a:{'b' * 200}{n}" for n in range(100)))


def test_the_longest_scope_is_accepted() -> None:
    assert parse_scope("a:" + "b" * (MAX_SCOPE_CHARS - 2))
    assert parse_scope(":".join("a" * MAX_SEGMENTS))


def test_the_empty_set_allows_nothing() -> None:
    empty = ScopeSet.parse("")
    assert not empty.allows("a:b")
    assert not len(empty)
    assert empty.is_subset(ScopeSet.parse("a:b"))


def test_parts_of_a_scope() -> None:
    scope = parse_scope("files:read:0a1b")
    assert scope.family == "files"
    assert scope.operation == "files:read"
    assert parse_scope("files:*").operation == "files:*"


def test_the_scopes_that_a_service_owns() -> None:
    scopes = ScopeSet.parse("tasks:* files:read coder:* orchestrator:x")
    assert str(scopes.owned_by("orchestrator")) == "tasks:* files:read orchestrator:x"
    assert str(scopes.owned_by("coder")) == "coder:*"
