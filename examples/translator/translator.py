"""An arm in ten lines: it looks terms up, translates, and streams what it writes.

Run it with ``octollm serve translator:arm`` from this folder.
"""

from octollm import Arm, Context, Task

arm = Arm("translator", description="Translates text", calls=["retriever:search", "models:chat"])


@arm.operation
async def execute(task: Task, ctx: Context) -> str:
    """Translate the goal, with what the documents know of its words."""
    found = await ctx.call("retriever", "search", {"query": task.goal})
    text = ""
    async for piece in ctx.model.stream(f"Translate with {found}: {task.goal}"):
        await ctx.emit(piece)
        text += piece
    return text
