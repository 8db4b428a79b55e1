"""What is told of a bearer string: each hop, what it dropped, and who refuses it."""

from __future__ import annotations

import pytest
from capability_forge import NOW, TrustDomain

from octollm.capability import REASONS, CapabilityError, Revocations
from octollm.capability.errors import REASON_TEXTS
from octollm.capability.inspection import explain_reason, find_refusal_reason, inspect


def test_every_reason_has_a_sentence() -> None:
    assert REASON_TEXTS.keys() == REASONS.keys()
    assert all(text.endswith(".") and len(text) < 120 for text in REASON_TEXTS.values())
    assert explain_reason("expired") == "A link of the chain has expired."


def test_a_chain_of_three_hops(domain: TrustDomain) -> None:
    says = inspect(domain.case().bearer())
    assert (says.subject, says.credential, says.tenant, says.audience) == ("alice", "key-1", "acme", "executor")
    assert [(hop.issuer, hop.holder, hop.kind, hop.hops) for hop in says.hops] == [
        ("orchestrator", "coder", "grant", 3),
        ("coder", "judge", "grant", 2),
        ("judge", "executor", "grant", 1),
        ("judge", "executor", "access", 0),
    ]
    coder, judge, executor, access = says.hops
    assert coder.allows == (
        "judge:validate",
        "judge:validate > executor:run",
        "judge:validate > executor:run > files:read",
        "models:chat",
    )
    assert coder.dropped == ()
    assert judge.dropped == ("models:chat",)
    assert executor.allows == ("files:read",)
    assert access.allows == ("executor:run",)
    assert (access.expires, access.jti) == (NOW + 60, "a-executor")
    assert access.key == domain.jkt("judge")


def test_what_a_hop_dropped_on_the_way_is_named(domain: TrustDomain) -> None:
    case = domain.case()
    case.judge.claims["may"] = {"executor:run": {}}
    case.own = None
    del case.access.claims["gnt"]
    says = inspect(case.bearer())
    assert says.hops[1].dropped == ("models:chat", "executor:run > files:read")


def test_who_refuses_it_and_why(domain: TrustDomain) -> None:
    bearer = domain.case().bearer()

    def why(service: str) -> str | None:
        return find_refusal_reason(bearer, service, domain.roots, domain.clock)

    assert why("executor") is None
    assert why("coder") == "audience_wrong"
    assert find_refusal_reason(bearer, "executor", {}, domain.clock) == "root_unknown"
    revoked = Revocations()
    revoked.add("jti", "g-judge", NOW, "acme")
    assert find_refusal_reason(bearer, "executor", domain.roots, domain.clock, revoked) == "revoked"
    domain.clock.time += 120
    assert why("executor") == "expired"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "bearer_missing"),
        ("x" * 20_000, "bearer_too_large"),
        ("ü", "bearer_malformed"),
        ("a.b.c", "base64_malformed"),
    ],
)
def test_what_is_no_token_is_said(text: str, reason: str) -> None:
    with pytest.raises(CapabilityError) as caught:
        inspect(text)
    assert caught.value.reason == reason
