"""Token chains of one to five hops between services with their own keys, as in an installation."""

from __future__ import annotations

from dataclasses import dataclass

from octollm.capability import (
    DelegationTree,
    Delegator,
    Principal,
    PublicKey,
    RootMinter,
    SigningKey,
    TaskRef,
    VerifiedChain,
    Verifier,
    parse_delegation_tree,
)
from octollm.capability.inspection import read_chain
from octollm.clock import SystemClock, Uuid7Generator

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
HOPS: tuple[tuple[str, str], ...] = (
    ("coder", "coder:execute"),
    ("judge", "judge:validate"),
    ("executor", "executor:run"),
    ("retriever", "retriever:search"),
    ("memory", "memory:read"),
)
"""The services of a chain in order, each with the scope of its call."""


@dataclass(frozen=True)
class Chain:
    """The bearer string that the last hop receives, with the inputs of its signatures."""

    bearer: str
    audience: str
    roots: dict[str, PublicKey]
    signed: tuple[tuple[PublicKey, bytes, bytes], ...]
    """Public key, signature and message of every part."""

    def verifier(self) -> Verifier:
        """Return a verifier with an empty cache."""
        return Verifier(self.audience, self.roots, CLOCK)


@dataclass(frozen=True)
class Minter:
    """Mints the token of one hop repeatedly: at the root, or under the grant of the previous hop."""

    root: RootMinter
    before: VerifiedChain | None
    delegator: Delegator | None
    audience: str
    scope: str
    jkt: str
    delegation: DelegationTree

    def mint(self) -> str:
        """Return the bearer string of the hop."""
        if self.before is None or self.delegator is None:
            return self.root.mint_access(
                Principal("0193f1c2-user", "key-0193f1c2", "acme"),
                self.audience,
                self.scope,
                task=TaskRef("task-" + IDS.hex(), "s1", 1, 1),
                delegation=self.delegation,
                holder_jkt=self.jkt,
            )
        return self.delegator.delegate(self.before, self.audience, self.scope, self.jkt)


def chain_of(depth: int) -> tuple[Chain, Minter]:
    """Return the chain of ``depth`` hops, and the minter of its last one."""
    root = SigningKey.generate("orchestrator")
    keys = {name: SigningKey.generate(name) for name, _ in HOPS}
    roots = {root.thumbprint: root.public}
    minter = RootMinter(root, CLOCK, IDS)
    # The last hop may make one more call, so that every bearer string has a grant for the callee.
    tree = parse_delegation_tree({"files:read": {}})
    for _name, scope in reversed(HOPS[1:depth]):
        tree = parse_delegation_tree({scope: tree.to_dict()})
    last: Minter | None = None
    bearer, before, delegator = "", None, None
    for name, scope in HOPS[:depth]:
        last = Minter(minter, before, delegator, name, scope, keys[name].thumbprint, tree)
        bearer = last.mint()
        before = Verifier(name, roots, CLOCK).verify(bearer)
        delegator = Delegator(keys[name], name, CLOCK, IDS)
    assert last is not None
    parts = read_chain(bearer).parts_with_parents()
    owner = {key.thumbprint: key.public for key in (root, *keys.values())}
    signed = tuple(
        (
            owner[part.embedded.thumbprint if part.embedded is not None else part.jws.header.kid or ""],
            part.jws.signature,
            part.jws.signing_input,
        )
        for part, _parent in parts
    )
    return Chain(bearer, HOPS[depth - 1][0], roots, signed), last
