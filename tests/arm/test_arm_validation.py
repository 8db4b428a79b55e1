"""Mistakes of an arm's author are told where they are made, with what would be right."""

import dataclasses
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm import Arm, ArmError, Context, ExecuteResult, Task, executor, retriever
from octollm.capability import DeclaredCall
from octollm.contracts.services import BUILT_IN_ARMS, ORCHESTRATOR_FAMILIES, SERVICES


class Plain:
    """Nothing that JSON stands for."""


@dataclasses.dataclass
class Text:
    text: str


async def yields_without_decorator():
    yield 1


def an_arm(**more) -> Arm:
    return Arm(**{"name": "translator", "description": "Translates text", **more})


def refused(act) -> str:
    with pytest.raises(ArmError) as caught:
        act()
    assert caught.value.code == "arm_invalid"
    return caught.value.detail


@given(st.from_regex(r"[a-z][a-z0-9_-]{0,39}", fullmatch=True))
def test_a_good_name_is_taken(name):
    if name not in SERVICES and name not in ORCHESTRATOR_FAMILIES:
        assert an_arm(name=name).name == name


@given(st.text(max_size=60))
def test_any_other_name_is_refused(name):
    if re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", name) is None:
        assert "begins with a letter" in refused(lambda: an_arm(name=name))


@pytest.mark.parametrize("name", sorted({*SERVICES, *ORCHESTRATOR_FAMILIES}))
def test_the_names_of_the_system_are_reserved(name):
    assert "reserved" in refused(lambda: an_arm(name=name))


def test_only_built_in_arms_are_built_in():
    for name in BUILT_IN_ARMS:
        assert Arm.built_in(name, "Does something").name == name
    assert "not a built-in arm" in refused(lambda: Arm.built_in("translator", "Does something"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"description": "  "}, "needs a description"),
        ({"description": "x" * 501}, "up to 500 characters"),
        ({"port": 8110}, "octollm serve --port"),
        ({"lifespan": "a pool"}, "is not a function"),
        ({"lifespan": yields_without_decorator}, "@asynccontextmanager"),
        ({"calls": retriever.search}, "calls=[retriever:search]"),
        ({"calls": "models:chat"}, "calls=['models:chat']"),
        ({"calls": ["models"]}, "'models' in the calls"),
        ({"calls": ["Models:Chat"]}, "<service>:<operation>"),
        ({"optional_calls": ["retriever:search", "a b:c"]}, "'a b:c'"),
    ],
)
def test_a_wrong_argument_is_refused(more, said):
    assert said in refused(lambda: an_arm(**more))


async def plain(task: Task, ctx: Context) -> str:
    return task.goal


async def two_texts(body: Text, ctx: Context) -> str:
    return body.text


async def no_types(task, ctx):
    return ""


async def no_answer(task: Task, ctx: Context):
    return ""


async def without_answer(task: Task, ctx: Context) -> None: ...


async def alone(task: Task) -> str:
    return ""


async def odd(body: Plain, ctx: Context) -> str:
    return ""


async def raw(body: bytes, ctx: Context) -> str:
    return ""


async def unknown(body: "Unknown", ctx: Context) -> str:  # noqa: F821  that is the mistake
    return ""


def not_async(task: Task, ctx: Context) -> str:
    return ""


@pytest.mark.parametrize(
    ("handler", "name", "said"),
    [
        (no_types, "search", "has no type for task and return; write async def search(body: Type"),
        (no_answer, "search", "has no type for return"),
        (without_answer, "search", "The answer of translator:search cannot be"),
        (alone, "search", "takes 1 parameters"),
        (odd, "search", "use a dataclass"),
        (raw, "search", "The body of translator:search cannot be"),
        (unknown, "search", "top of the module"),
        (not_async, "search", "must be a coroutine"),
        (two_texts, "execute", "execute(task: Task, ctx: Context)"),
        (plain, "Search", "begins with a letter"),
        (plain, "search-fast", "a-z, 0-9 and _"),
        (plain, "health", "every service already serves /health itself"),
    ],
)
def test_a_wrong_operation_is_refused(handler, name, said):
    assert said in refused(lambda: an_arm().operation(name)(handler))


def test_a_bare_decorator_declares():
    arm = an_arm()
    assert arm.operation(two_texts) is two_texts
    assert [(declared.name, declared.body) for declared in arm.operations] == [("two_texts", Text)]


@pytest.mark.parametrize(
    ("handler", "said"),
    [(no_types, "write async def no_types(body: Type"), (not_async, "must be a coroutine"), (3, "is not a function")],
)
def test_a_bare_decorator_refuses_what_is_no_operation(handler, said):
    assert said in refused(lambda: an_arm().operation(handler))


def test_a_bare_decorator_refuses_the_same_name_twice():
    arm = an_arm()
    arm.operation(two_texts)
    assert "already has an operation 'two_texts'" in refused(lambda: arm.operation(two_texts))


def test_an_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="host"):
        an_arm(host="here")


def test_an_operation_is_declared_once():
    arm = an_arm()
    arm.operation("execute")(plain)
    assert "give this one another name" in refused(lambda: arm.operation("execute")(plain))


def test_a_kind_that_there_is_not_is_refused():
    assert "read_only, idempotent, at_most_once" in refused(lambda: an_arm().operation("search", kind="often")(plain))


def test_declared_calls_hold_for_every_operation():
    arm = an_arm(calls=["models:chat"], optional_calls=["retriever:search"])
    arm.operation("execute")(plain)
    arm.operation("shorten")(two_texts)
    calls = (DeclaredCall("models:chat"), DeclaredCall("retriever:search", optional=True))
    assert arm.declarations() == {"translator:execute": calls, "translator:shorten": calls}
    assert arm.calls == ("models:chat", "retriever:search")


def test_an_operation_declares_its_own_calls():
    arm = an_arm(calls=["models:chat", retriever.search])
    arm.operation("execute")(plain)
    arm.operation("shorten", calls=[executor.run], optional_calls=["models:chat"])(two_texts)
    arm.operation("quiet", calls=[])(two_texts)
    assert arm.declarations() == {
        "translator:execute": (DeclaredCall("models:chat"), DeclaredCall("retriever:search")),
        "translator:shorten": (DeclaredCall("executor:run"), DeclaredCall("models:chat", optional=True)),
        "translator:quiet": (),
    }
    # For the arm as a whole a call is optional only where no operation requires it.
    assert arm.declared_calls == ("models:chat", "retriever:search", "executor:run")
    assert "'nothing' in the calls" in refused(lambda: arm.operation("more", calls=["nothing"])(two_texts))


def test_the_decorated_function_stays_itself():
    assert an_arm().operation("shorten")(two_texts) is two_texts


def test_a_task_is_the_contract_that_an_arm_is_given():
    assert msgspec.json.decode(b'{"goal": "x"}', type=Task).goal == "x"
    assert ExecuteResult("done").artifacts == ()
