"""`octollm keys …` and `octollm token …`."""

from __future__ import annotations

from urllib.parse import quote

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli.door import open_door
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output
from octollm.contracts.api import KeyList, KeyRequest, NewKey, TokenAnswer, TokenRequest


def create_command(name: str, scope: str, *, as_json: bool) -> int:
    """Make a key; its secret is all that goes to standard output, so that it can be taken from there."""

    async def work() -> int:
        async with open_door(command_settings()) as door:
            made = await door.post("/keys", KeyRequest(name, scope), NewKey)
        if as_json:
            print(msgspec.json.encode(made).decode(), flush=True)
            return EXIT_DONE
        messages().print(Text(f"Key {made.key.id} ({made.key.name}: {made.key.scope}). It is shown this once:"))
        print(made.secret, flush=True)
        return EXIT_DONE

    return run_command(work)


def list_command(*, as_json: bool) -> int:
    """List keys."""

    async def work() -> int:
        async with open_door(command_settings()) as door:
            found = await door.get("/keys", KeyList)
        if as_json:
            print(msgspec.json.encode(found).decode())
            return EXIT_DONE
        table = Table(box=None)
        for column in ("Id", "Name", "Scope", "Made", "Last used", "State"):
            table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
        for key in found.keys:
            state = "revoked" if key.revoked_at else "good"
            table.add_row(
                key.id, Text(key.name), Text(key.scope), key.created_at[:10], (key.last_used_at or "")[:10], state
            )
        output().print(table)
        return EXIT_DONE

    return run_command(work)


def revoke_command(key_id: str, *, as_json: bool) -> int:
    """Revoke a key."""

    async def work() -> int:
        async with open_door(command_settings()) as door:
            await door.send("DELETE", f"/keys/{quote(key_id, safe='')}")
        if as_json:
            print(msgspec.json.encode({"id": key_id, "state": "revoked"}).decode())
        else:
            output().print(Text(f"Key {key_id} is revoked."))
        return EXIT_DONE

    return run_command(work)


def mint_command(scope: str, aud: str, lifetime: int, *, as_json: bool) -> int:
    """Print a token alone."""

    async def work() -> int:
        async with open_door(command_settings()) as door:
            answer = await door.post("/token", TokenRequest(scope, aud, lifetime), TokenAnswer)
        print(msgspec.json.encode(answer).decode() if as_json else answer.access_token, flush=True)
        return EXIT_DONE

    return run_command(work)
