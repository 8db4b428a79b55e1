"""Reuse at the minter and at the callee: a reused token says what a fresh one would, and proves no more."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
from capability_forge import ALICE, NOW, WORK, TrustDomain, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from octollm.capability import (
    CallTokens,
    CapabilityError,
    Delegator,
    PublicKey,
    Revocations,
    TaskRef,
    VerifiedChain,
    Verifier,
    parse_delegation_tree,
)
from octollm.capability.inspection import read_chain

MAY = {
    "judge:validate": {"executor:run": {}, "models:chat": {}},
    "judge:accept": {"models:chat": {}},
    "executor:run": {"files:read": {}},
    "models:chat": {},
}
TARGETS = (
    ("judge", "judge:validate"),
    ("judge", "judge:accept"),
    ("executor", "executor:run"),
    ("models", "models:chat"),
)


def verify_at_coder(domain: TrustDomain, task: TaskRef = WORK, *, grant_lifetime: float = 3_600) -> VerifiedChain:
    """Return what coder sees of a bearer string that the root sent it for a step."""
    bearer = domain.minter.mint_access(
        ALICE,
        "coder",
        "coder:execute",
        task=task,
        delegation=parse_delegation_tree(MAY),
        holder_jkt=domain.jkt("coder"),
        grant_lifetime=grant_lifetime,
    )
    return domain.verifier("coder").verify(bearer)


def own_grant(bearer: str) -> str:
    return bearer.rsplit("~", 1)[1]


def judge_bearer(domain: TrustDomain, delegator: Delegator, verified: VerifiedChain, **options: str) -> str:
    return delegator.delegate(verified, "judge", "judge:validate", domain.jkt("judge"), **options)  # type: ignore[arg-type]


def test_a_grant_is_reused_for_one_callee_of_one_step_and_access_tokens_are_new(domain: TrustDomain) -> None:
    verified, coder = verify_at_coder(domain), domain.delegator("coder")
    first, second = (judge_bearer(domain, coder, verified, call=call) for call in ("c1", "c2"))
    assert own_grant(first) == own_grant(second)
    one, other = (domain.verifier("judge").verify(bearer) for bearer in (first, second))
    assert (one.call, other.call) == ("c1", "c2")
    assert one.links[0].jti != other.links[0].jti


def test_another_scope_key_or_parent_has_another_grant(domain: TrustDomain) -> None:
    verified, coder = verify_at_coder(domain), domain.delegator("coder")
    mine = own_grant(judge_bearer(domain, coder, verified))
    others = [
        coder.delegate(verified, "judge", "judge:accept", domain.jkt("judge")),
        coder.delegate(verified, "judge", "judge:validate:x", domain.jkt("judge")),
        coder.delegate(verified, "judge", "judge:validate", domain.jkt("mallory")),
        judge_bearer(domain, coder, verify_at_coder(domain)),
        judge_bearer(domain, coder, verify_at_coder(domain, TaskRef(WORK.task, "s2", 0, 3))),
        judge_bearer(domain, coder, verify_at_coder(domain, TaskRef(WORK.task, "s1", 1, 3))),
    ]
    grants = [own_grant(bearer) for bearer in others]
    assert len({mine, *grants}) == len(grants) + 1


def test_a_revoked_grant_is_minted_anew(domain: TrustDomain) -> None:
    revocations = Revocations()
    coder = Delegator(domain.keys["coder"], "coder", domain.clock, domain.ids, revocations)
    verified = verify_at_coder(domain)
    tokens = CallTokens(coder, verified, "c1")
    judge = domain.verifier("judge", revocations)
    first = tokens.bearer("judge", "judge:validate", domain.jkt("judge"))
    grant = judge.verify(first).grant
    assert grant is not None
    revocations.add("jti", grant.jti, NOW, ALICE.tenant)
    assert refused(judge, first) == "revoked"
    second = tokens.bearer("judge", "judge:validate", domain.jkt("judge"))
    assert own_grant(second) != own_grant(first)
    assert judge.verify(second)
    revocations.add("task", WORK.task, NOW, ALICE.tenant)
    assert refused(judge, second) == "revoked"
    assert refused(judge, tokens.bearer("judge", "judge:validate", domain.jkt("judge"))) == "revoked"


def test_a_revoked_access_token_is_minted_anew(domain: TrustDomain) -> None:
    revocations = Revocations()
    coder = Delegator(domain.keys["coder"], "coder", domain.clock, domain.ids, revocations)
    tokens = CallTokens(coder, verify_at_coder(domain), "c1")
    first = tokens.bearer("models", "models:chat", None)
    assert tokens.bearer("models", "models:chat", None) == first
    revocations.add("jti", read_chain(first).access.claims.jti, NOW, ALICE.tenant)
    assert tokens.bearer("models", "models:chat", None) != first


@pytest.mark.parametrize(("moved", "reused"), [(0.0, True), (30.0, True), (30.001, False), (-0.02, False)])
def test_an_access_token_is_reused_with_half_of_its_life_left(domain: TrustDomain, moved: float, reused: bool) -> None:
    tokens = CallTokens(domain.delegator("coder"), verify_at_coder(domain), "c1")
    domain.clock.time = NOW + 1
    first = tokens.bearer("models", "models:chat", None)
    domain.clock.time += moved
    assert (tokens.bearer("models", "models:chat", None) == first) is reused


def test_at_the_end_of_a_step_the_last_token_is_reused_and_none_outlives_it(domain: TrustDomain) -> None:
    tokens = CallTokens(domain.delegator("coder"), verify_at_coder(domain, grant_lifetime=40), "c1")
    first = tokens.bearer("models", "models:chat", None)
    domain.clock.time = NOW + 39.9
    assert tokens.bearer("models", "models:chat", None) == first, "a fresh one would end at the same time"
    domain.clock.time = NOW + 40
    with pytest.raises(CapabilityError) as caught:
        tokens.bearer("models", "models:chat", None)
    assert caught.value.code == "token_expired"


def test_past_the_bound_tokens_are_minted_each_time(domain: TrustDomain) -> None:
    tokens = CallTokens(domain.delegator("coder"), verify_at_coder(domain), "c1")
    scopes = [f"judge:validate:{number}" for number in range(100)]
    bearers = {scope: tokens.bearer("judge", scope, domain.jkt("judge")) for scope in scopes}
    again = [tokens.bearer("judge", scope, domain.jkt("judge")) == bearers[scope] for scope in scopes]
    assert again == [True] * 64 + [False] * 36


def test_what_is_refused_once_is_refused_again_after_a_reusable_token(domain: TrustDomain) -> None:
    tokens = CallTokens(domain.delegator("coder"), verify_at_coder(domain), "c1")
    tokens.bearer("judge", "judge:validate", domain.jkt("judge"))
    for aud, scope in (("judge", "judge:*"), ("models", "judge:validate"), ("judge", "judge:other")):
        for _ in range(2):
            with pytest.raises(CapabilityError) as caught:
                tokens.bearer(aud, scope, domain.jkt("judge"))
            assert caught.value.reason == "not_in_may"


@dataclass(frozen=True)
class _ServedCall:
    """A call that coder serves: of which step, and its tokens."""

    task: TaskRef
    call: str
    verified: VerifiedChain
    tokens: CallTokens


_calls = st.tuples(st.integers(0, 5), st.integers(0, len(TARGETS) - 1), st.sampled_from([0.0, 1.0, 15.0, 31.0, 200.0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(_calls, min_size=1, max_size=25), st.sampled_from([45.0, 600.0, 3_600.0]))
def test_reused_tokens_stay_within_their_parent_task_step_call_and_scope(
    calls: list[tuple[int, int, float]], grant_lifetime: float
) -> None:
    """Six served calls, two of each step, call at random times: whatever is reused, a cold verifier accepts it."""
    domain = TrustDomain()
    coder = domain.delegator("coder")
    steps = [TaskRef(WORK.task, "s1", 0, 3), TaskRef(WORK.task, "s2", 0, 3), TaskRef("task-other", "s1", 0, 3)]
    served: list[_ServedCall] = []
    for number in range(6):
        task = steps[number // 2]
        # The second call of a step comes under the same grant, as from a second instance of its caller.
        verified = served[-1].verified if number % 2 else verify_at_coder(domain, task, grant_lifetime=grant_lifetime)
        served.append(_ServedCall(task, f"call-{number}", verified, CallTokens(coder, verified, f"call-{number}")))
    owners: dict[str, int] = {}
    for number, target, pause in calls:
        domain.clock.time += pause
        aud, scope = TARGETS[target]
        holder = None if aud == "models" else domain.jkt(aud)
        one = served[number]
        assert one.verified.grant is not None
        parent = one.verified.grant
        if domain.clock.time >= parent.exp:
            with pytest.raises(CapabilityError):
                one.tokens.bearer(aud, scope, holder)
            continue
        bearer = one.tokens.bearer(aud, scope, holder)
        assert owners.setdefault(bearer, number) == number, "no token is shared by two served calls"
        at = Verifier(aud, domain.roots, domain.clock).verify(bearer)
        assert (at.task, at.call, str(at.scopes)) == (one.task, one.call, scope)
        assert at.links[0].exp <= min(domain.clock.time + 60, parent.exp)
        assert at.links[0].exp >= min(domain.clock.time + 30, parent.exp), "it has enough life left"
        assert at.links[0].exp - at.links[0].iat <= 60.001
        if at.grant is not None:
            assert at.grant.exp <= parent.exp
            assert at.grant.may == parent.may.subtree(next(iter(at.scopes)))
            assert at.grant.cnf.jkt == holder


# The callee: a verifier that has seen much gives the verdicts of one that has seen nothing.


def verdict(verifier: Verifier, bearer: str) -> VerifiedChain | str:
    try:
        return verifier.verify(bearer)
    except CapabilityError as error:
        return error.code


class _Traffic:
    """Bearer strings for judge from honest minting, and recombinations of their parts; minted once for all examples."""

    def __init__(self) -> None:
        self.domain = domain = TrustDomain()
        coder = domain.delegator("coder")
        self.bearers: list[str] = []
        for task, lifetime in ((WORK, 3_600.0), (WORK, 100.0), (TaskRef("task-other", "s9", 1, 1), 3_600.0)):
            verified = verify_at_coder(domain, task, grant_lifetime=lifetime)
            for scope in ("judge:validate", "judge:accept"):
                for call in ("c1", "c2"):
                    self.bearers.append(coder.delegate(verified, "judge", scope, domain.jkt("judge"), call=call))
                self.bearers.append(coder.delegate(verified, "judge", scope, None))
            self.bearers.append(coder.delegate(verified, "executor", "executor:run", domain.jkt("executor")))
        self.bearers.append(domain.minter.mint_access(ALICE, "judge", "judge:validate", task=WORK))
        self.accesses = [bearer.partition("~")[0] for bearer in self.bearers]
        self.grants = [bearer.partition("~")[2] for bearer in self.bearers]

    def trust_root(self) -> None:
        self.domain.roots[self.domain.root.thumbprint] = self.domain.root.public

    def reset(self) -> None:
        """Set the clock back to when the tokens were minted, and trust the root."""
        self.domain.clock.time = NOW
        self.trust_root()


@functools.cache
def traffic_at_start() -> _Traffic:
    return _Traffic()


_moves = st.one_of(
    st.tuples(st.just("bearer"), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("mixed"), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("time"), st.integers(-40, 150), st.just(0)),
    st.tuples(st.just("revoke"), st.integers(0, 99), st.integers(0, 3)),
    st.tuples(st.just("root"), st.integers(0, 1), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_moves, min_size=1, max_size=40))
def test_a_warm_verifier_gives_the_verdicts_of_a_cold_one(moves: list[tuple[str, int, int]]) -> None:
    traffic = traffic_at_start()
    traffic.reset()
    domain = traffic.domain
    revocations = Revocations()
    warm = Verifier("judge", domain.roots, domain.clock, cache_size=8, revocations=revocations)
    for move, one, other in moves:
        if move == "time":
            domain.clock.time += one
        elif move == "root":
            domain.roots.clear()
            if one:
                traffic.trust_root()
        elif move == "revoke":
            links = read_chain(traffic.bearers[one % len(traffic.bearers)]).links
            revocations.add("jti", links[other % len(links)].jti, domain.clock.time, ALICE.tenant)
        else:
            place = one % len(traffic.bearers)
            bearer = traffic.bearers[place]
            if move == "mixed":
                bearer = f"{traffic.accesses[place]}~{traffic.grants[other % len(traffic.grants)]}".rstrip("~")
            cold = Verifier("judge", domain.roots, domain.clock, revocations=revocations)
            expected, actual = verdict(cold, bearer), verdict(warm, bearer)
            assert actual == expected


def test_known_grants_spare_all_signatures_but_the_access_tokens(
    domain: TrustDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    honest = PublicKey.verify

    def counting(self: PublicKey, signature: bytes, message: bytes) -> bool:
        seen.append(1)
        return honest(self, signature, message)

    monkeypatch.setattr(PublicKey, "verify", counting)
    verified, coder, judge = verify_at_coder(domain), domain.delegator("coder"), domain.verifier("judge")
    seen.clear()
    for number in range(10):
        judge.verify(judge_bearer(domain, coder, verified, call=f"c{number}"))
    assert len(seen) == 12, "two grants once, and each access token"


def test_a_warm_verifier_checks_the_signature_of_each_access_token(domain: TrustDomain) -> None:
    """The tempting forgery: grants that are known here, and an access token by somebody else's key."""
    verified, coder, judge = verify_at_coder(domain), domain.delegator("coder"), domain.verifier("judge")
    honest = judge_bearer(domain, coder, verified)
    assert judge.verify(honest)
    access, _, grants = honest.partition("~")
    head = access.rpartition(".")[0]
    other = judge_bearer(domain, coder, verified, call="c2").partition("~")[0].rpartition(".")[2]
    assert refused(judge, f"{head}.{other}~{grants}") == "signature_invalid"
    assert judge.verify(honest)


def test_what_was_minted_in_the_same_millisecond_is_reused(domain: TrustDomain) -> None:
    """Times are rounded to milliseconds, so that a token may be issued a little later than now."""
    domain.clock.time = NOW + 0.0006
    verified, coder = verify_at_coder(domain), domain.delegator("coder")
    tokens = CallTokens(coder, verified, "c1")
    first = tokens.bearer("judge", "judge:validate", domain.jkt("judge"))
    assert read_chain(first).access.claims.iat > domain.clock.time
    assert tokens.bearer("judge", "judge:validate", domain.jkt("judge")) == first
    assert own_grant(judge_bearer(domain, coder, verified)) == own_grant(first)


def test_a_clock_set_back_reuses_no_grant_from_the_future(domain: TrustDomain) -> None:
    verified, coder = verify_at_coder(domain), domain.delegator("coder")
    domain.clock.time = NOW + 100
    first = judge_bearer(domain, coder, verified)
    domain.clock.time = NOW + 10
    second = judge_bearer(domain, coder, verified)
    assert own_grant(first) != own_grant(second)
    assert domain.verifier("judge").verify(second)
