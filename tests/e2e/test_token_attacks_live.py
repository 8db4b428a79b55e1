"""What may be done to a bearer string, done to a running installation: each is refused for its own reason."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import pytest
import pytest_asyncio
from attack_kit import AttackKit, attack_kit
from capability_forge import Case
from token_edits import EDITS, NARROWINGS, SHUFFLES, Edit

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[AttackKit]:
    async with attack_kit(tmp_path_factory.mktemp("attacked")) as found:
        yield found


async def accepted(live: AttackKit, case: Case) -> bool:
    """Say whether the executor believed a bearer: then only the empty body is refused."""
    told = await live.run(case.bearer())
    return (told.status, told.code, told.reason) == (400, "invalid_body", "")


async def test_the_honest_chain_has_code_run(live: AttackKit) -> None:
    code = {"language": "python", "command": ["-c", "print(6 * 7)"]}
    told = await live.send("executor", "POST", "/run", live.domain.case().bearer(), code)
    assert (told.status, told.reason) == (200, ""), told
    assert told.body["stdout"] == "42\n"


@pytest.mark.parametrize(("edit", "reason"), [row[1:] for row in EDITS], ids=[row[0] for row in EDITS])
async def test_an_edit_is_refused_and_its_honest_twin_accepted(live: AttackKit, edit: Edit, reason: str) -> None:
    case = live.domain.case()
    edit(live.domain, case)
    for _ in range(2):
        told = await live.run(case.bearer())
        assert (told.status, told.reason) == (401, reason)
        assert reason == "expired" or reason not in str(told.body), "the rule is not told to a prober"
        assert told.headers["www-authenticate"].startswith("Bearer")
        # What was refused leaves nothing behind, and what was believed lets nothing else in.
        assert await accepted(live, live.domain.case())


@pytest.mark.parametrize("edit", [row[1] for row in NARROWINGS], ids=[row[0] for row in NARROWINGS])
async def test_a_narrowing_is_believed(live: AttackKit, edit: Edit) -> None:
    case = live.domain.case()
    edit(live.domain, case)
    told = await live.run(case.bearer())
    assert told.status in (400, 403), told
    assert told.reason in ("", "scope_not_allowed")


@pytest.mark.parametrize(("shuffle", "reasons"), [row[1:] for row in SHUFFLES], ids=[row[0] for row in SHUFFLES])
async def test_links_order_and_length_are_fixed(
    live: AttackKit, shuffle: Callable[[list[str]], list[str]], reasons: set[str]
) -> None:
    case = live.domain.case()
    assert await accepted(live, case)
    case.shuffle = shuffle
    told = await live.run(case.bearer())
    assert told.status == 401
    assert told.reason in reasons


@pytest.mark.parametrize("mask", range(1, 15))
async def test_parts_of_two_chains_do_not_mix(live: AttackKit, mask: int) -> None:
    first, second = live.domain.case(), live.domain.case()
    for token in (second.access, second.coder, second.judge, second.own):
        assert token is not None
        token.claims["task"] = "task-" + "f" * 32
    left, right = first.parts(), second.parts()
    mixed = [right[n] if mask >> n & 1 else left[n] for n in range(4)]
    told = await live.run("~".join(mixed))
    assert (told.status, told.reason in {"grant_mismatch", "proof_mismatch"}) == (401, True)


async def test_a_megabyte_of_token_is_refused_before_it_is_read(live: AttackKit) -> None:
    told = await live.run("a" * 1_000_000)
    assert told.status in (401, 431)
