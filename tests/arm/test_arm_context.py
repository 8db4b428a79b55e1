"""What an operation works with: its own authority, typed calls, shared state, facts about the call."""

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from octollm import Arm, ArmError, Context, OctoError, OperationReference, Task, judge, retriever
from octollm.contracts.operations import SearchResult
from octollm.contracts.task import Budget, Usage
from octollm.testing import ArmTestClient, run_arm

PASSAGES = {
    "passages": [{"source": "a.md", "digest": "0", "line_start": 1, "line_end": 1, "text": "Hallo", "score": 0.5}]
}

finder = Arm("finder", description="Finds", calls=[retriever.search], optional_calls=[judge.validate])


@finder.operation
async def find(body: str, ctx: Context) -> str:
    """Find by a typed reference."""
    answer = await ctx.call(retriever.search, query=body, limit=1)
    assert isinstance(answer, SearchResult)
    return answer.passages[0].text


@finder.operation
async def find_by_name(body: str, ctx: Context) -> str:
    """Find by name."""
    return (await ctx.call("retriever", "search", {"query": body}, SearchResult)).passages[0].text


@finder.operation
async def misspell(body: str, ctx: Context) -> str:
    """Call with a field that there is not."""
    await ctx.call(retriever.search, question=body)  # pyright: ignore[reportCallIssue]  that is the mistake
    return "it was let through"


@finder.operation(calls=[judge.validate])
async def check(body: str, ctx: Context) -> str:
    """Call what this operation declares."""
    assert not ctx.allows(retriever.search)
    return "; ".join((await ctx.call(judge.validate, code=body)).reasons)


@finder.operation(calls=[])
async def overreach(body: str, ctx: Context) -> str:
    """Call what another operation of the arm declares."""
    await ctx.call(retriever.search, query=body)
    return "it was let through"


@pytest.mark.parametrize("operation", ["find", "find_by_name"])
@pytest.mark.parametrize("key", [retriever.search, "retriever:search"])
def test_a_reference_is_the_call_by_name(operation, key):
    answer, client = run_arm(finder, operation, "hello", answers={key: PASSAGES})
    assert answer == "Hallo"
    [call] = client.calls
    assert (call.scope, call.body["query"]) == ("retriever:search", "hello")


async def test_a_field_that_a_body_does_not_have_is_named():
    async with ArmTestClient(finder, answers={retriever.search: PASSAGES}) as client:
        with pytest.raises(OctoError) as caught:
            await client.call("misspell", "hello")
        assert caught.value.code == "arm_invalid"
        assert "retriever:search takes the fields of SearchRequest" in caught.value.detail
        assert client.calls == []


async def test_an_operation_has_the_authority_that_it_declares():
    answers = {retriever.search: PASSAGES, judge.validate: {"is_valid": False, "reasons": ["a typo"]}}
    async with ArmTestClient(finder, answers=answers) as client:
        assert await client.call("check", "x =") == "a typo"
        with pytest.raises(OctoError, match=r"finder:overreach does not declare.*retriever:search") as caught:
            await client.call("overreach", "x")
        assert caught.value.code == "authority_missing"


async def test_an_operation_needs_the_authority_for_its_own_calls_only():
    async with ArmTestClient(finder, answers={judge.validate: {"is_valid": True}}) as client:
        assert await client.call("check", "x = 1", without=[retriever.search]) == ""
        with pytest.raises(OctoError) as caught:
            await client.call("check", "x = 1", without=[judge.validate])
        assert (caught.value.code, client.calls[1:]) == ("authority_missing", [])


@dataclasses.dataclass
class Word:
    word: str


def test_a_reference_to_an_arm_of_ones_own():
    lookup = OperationReference("glossary", "lookup", Word, Word)
    arm = Arm("asker", description="Asks another arm", calls=[lookup])

    @arm.operation
    async def execute(task: Task, ctx: Context) -> str:
        return (await ctx.call(lookup, word=task.goal)).word

    result, client = run_arm(arm, "execute", {"goal": "Arm"}, answers={"glossary:lookup": {"word": "arm"}})
    assert (result.output, client.calls[0].body) == ("arm", {"word": "Arm"})


class Pool:
    """A pool of connections, for these tests."""

    def __init__(self) -> None:
        self.is_open = True
        self.queries: list[str] = []


def pooled(pools: list[Pool]) -> Arm[Pool]:
    @asynccontextmanager
    async def open_pool() -> AsyncGenerator[Pool]:
        pools.append(Pool())
        yield pools[-1]
        pools[-1].is_open = False

    arm = Arm("pooled", description="Has a pool", lifespan=open_pool)

    @arm.operation
    async def query(body: str, ctx: Context[Pool]) -> int:
        assert ctx.state.is_open
        ctx.state.queries.append(body)
        return len(ctx.state.queries)

    return arm


@pytest.mark.parametrize("sockets", [False, True], ids=["memory", "sockets"])
async def test_the_state_is_shared_by_calls_and_closed_at_the_end(sockets):
    pools: list[Pool] = []
    async with ArmTestClient(pooled(pools), sockets=sockets) as client:
        assert [await client.call("query", text) for text in ("a", "b")] == [1, 2]
        assert [pool.is_open for pool in pools] == [True]
    assert [(pool.is_open, pool.queries) for pool in pools] == [(False, ["a", "b"])]


async def test_the_state_is_closed_when_a_test_fails():
    pools: list[Pool] = []
    with pytest.raises(ZeroDivisionError):
        async with ArmTestClient(pooled(pools)):
            raise ZeroDivisionError
    assert [pool.is_open for pool in pools] == [False]


async def test_an_arm_without_a_lifespan_has_no_state():
    arm = Arm("stateless", description="Has no state")

    @arm.operation
    async def ask(body: str, ctx: Context[None]) -> bool:
        return ctx.state is None

    async with ArmTestClient(arm) as client:
        assert await client.call("ask", "x") is True


@asynccontextmanager
async def no_database() -> AsyncGenerator[None]:
    raise ConnectionError("no database at localhost:5432")
    yield


@asynccontextmanager
async def no_setting() -> AsyncGenerator[None]:
    raise OctoError("Set GLOSSARY_URL.", code="setting_invalid")
    yield


@pytest.mark.parametrize(
    ("lifespan", "code", "said"),
    [
        (
            no_database,
            "arm_start_failed",
            "The arm broken cannot start: its lifespan raised ConnectionError: no database",
        ),
        (no_setting, "setting_invalid", "Set GLOSSARY_URL."),
        (lambda: 3, "arm_start_failed", "TypeError"),
    ],
)
async def test_a_lifespan_that_raises_fails_the_start(lifespan, code, said):
    arm = Arm("broken", description="Cannot start", lifespan=lifespan)

    @arm.operation
    async def ask(body: str, ctx: Context) -> str:
        return body

    with pytest.raises(OctoError) as caught:
        async with ArmTestClient(arm):
            pytest.fail("it started")
    assert caught.value.code == code
    assert said in caught.value.detail


informed = Arm("informed", description="Knows its call", calls=["models:chat"])


@informed.operation
async def facts(task: Task, ctx: Context) -> dict[str, object]:
    """Answer with the facts of the call."""
    await ctx.model.complete("one two three")
    info = ctx.info
    assert 0 < (info.budget_left.max_time_seconds or 0) <= 600
    return {
        "attempt": info.attempt,
        "step": info.step,
        "run": info.run,
        "tenant": info.tenant,
        "principal": info.principal,
        "task_id": info.task_id,
        "tokens": info.budget_left.max_tokens,
        "cost": info.budget_left.max_cost_usd,
    }


async def test_a_call_knows_its_step_and_what_is_left_of_the_budget():
    async with ArmTestClient(informed, model=["four five", "six"]) as client:
        first = await client.call("facts", {"goal": "x", "budget": {"max_tokens": 100, "max_cost_usd": 1.5}})
        prompt = client.model.requests[0]
        used = Usage(len(prompt.messages[-1].text.split()), 2).total_tokens
        assert first == {
            "attempt": 1,
            "step": "s1",
            "run": 1,
            "tenant": "default",
            "principal": "user-1",
            "task_id": "task-" + "0" * 32,
            "tokens": 100 - used,
            "cost": 1.5,
        }
        second = await client.call("facts", {"goal": "x"})
        assert (second["attempt"], second["tokens"]) == (2, None)


def test_a_budget_is_never_below_zero():
    _, client = run_arm(informed, "facts", {"goal": "x", "budget": {"max_tokens": 1}}, model=["four five"])
    assert client.model.prompts == ["one two three"]
    assert Budget(max_tokens=1).max_tokens == 1


async def test_a_test_client_is_opened_once():
    client = ArmTestClient(informed)
    with pytest.raises(RuntimeError, match="is not open"):
        await client.card()
    async with client:
        assert (await client.card())["name"] == "informed"
    with pytest.raises(RuntimeError, match="opened once"):
        await client.__aenter__()


def test_two_arms_with_one_name_are_refused(tmp_path, monkeypatch):
    from octollm.installation.arm_host import load_arms  # noqa: PLC0415  brings in the installation

    text = "from octollm import Arm\none = Arm('twin', 'Is there twice')\ntwo = Arm('twin', 'Is there twice')\n"
    (tmp_path / "twins_of_a_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [arm.name for arm in load_arms(["twins_of_a_test:one"])] == ["twin"]
    with pytest.raises(ArmError, match="twins_of_a_test:one and twins_of_a_test:two are both called 'twin'"):
        load_arms(["twins_of_a_test:one", "twins_of_a_test:two"])
