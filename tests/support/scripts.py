"""Scripts of the model in place of a real one: what it replies to a request, and the files that goals are about."""

from __future__ import annotations

import asyncio

from octollm.testing.fake_model import ModelScript, ScriptedReply, ScriptedRequest

CODE = 'def double(number: int) -> int:\n    """Return twice the number."""\n    return number * 2'
EXAMPLES = "assert double(2) == 4\nassert double(0) == 0\nassert double(-3) == -6\nassert double(10) == 20"
QUERY = "SELECT count(*) AS rows, sum(amount) AS total FROM sales WHERE amount > 100"
SALES = "region,amount\nnorth,150\nsouth,90\neast,250\nwest,100\n"
NOTES = "# Notes\n\nThe service retries a failed call three times.\n\nCats sleep through most of the day.\n"


def default_reply(asked: ScriptedRequest) -> str | ScriptedReply:
    """Answer as a good model would: by what the prompt asks for."""
    if asked.schema is not None and "steps" in str(asked.schema):
        return '{"steps": [{"title": "Do the work", "criteria": ["It is done."]}]}'
    if asked.system.startswith("You judge"):
        return '{"accepted": true, "reason": ""}'
    if "SQL" in asked.system:
        return f"```sql\n{QUERY}\n```"
    if "test cases" in asked.system:
        return EXAMPLES
    if "Python" in asked.system:
        return f"```python\n{CODE}\n```"
    return "The service retries a failed call three times."


class ReplaceableScript:
    """A script that a test replaces while the installation runs: set ``reply``."""

    def __init__(self) -> None:
        self.reply: ModelScript = default_reply

    def __call__(self, asked: ScriptedRequest) -> str | ScriptedReply:
        return self.reply(asked)


class HoldingScript:
    """Writes code, and holds all but the first piece of it until ``go`` is set; ``writing`` says that it is at it."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.writing = asyncio.Event()

    def __call__(self, asked: ScriptedRequest) -> str | ScriptedReply:
        found = default_reply(asked)
        if asked.schema is None and "test cases" not in asked.system and "Python" in asked.system:
            assert isinstance(found, str)
            self.writing.set()
            return ScriptedReply(found, release=self.go)
        return found

    def hold(self) -> None:
        """Hold the next code."""
        self.go.clear()
        self.writing.clear()
