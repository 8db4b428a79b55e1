"""Access tokens of an arm's calls: one serves the same operation within one served call, and no other call."""

from octollm import Arm, Context, Task
from octollm.capability.inspection import read_chain
from octollm.testing import ArmTestClient

caller = Arm("caller", description="Shows the tokens of its calls", calls=["models:chat", "retriever:search"])


@caller.operation("execute")
async def show_tokens(task: Task, ctx: Context) -> str:
    """Answer with the bearer strings of three calls."""
    del task
    calls = [
        await ctx.prepare_call("models", "chat", b"{}"),
        await ctx.prepare_call("models", "chat", b"{}"),
        await ctx.prepare_call("retriever", "search", b"{}"),
    ]
    return "\n".join(call.bearer for call in calls)


async def test_an_access_token_is_reused_within_one_served_call_only():
    async with ArmTestClient(caller) as client:
        served = [(await client.call("execute", {"goal": "x"})).output.split("\n") for _ in range(2)]
    for first, again, other in served:
        assert first == again
        assert other != first
    bearers = {bearer for each in served for bearer in each}
    assert len(bearers) == 4, "no token serves two calls"
    claims = [read_chain(each[0]).access.claims for each in served]
    assert claims[0].call != claims[1].call
    assert all(str(each.scope) == "models:chat" and each.exp - each.iat <= 60 for each in claims)
