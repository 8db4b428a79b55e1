"""`octollm keys …` and `octollm token …`."""

from __future__ import annotations

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli.door import open_client
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output
from octollm.contracts.api import KeyList


def create_key_command(name: str, scope: str, tenant: str | None, *, as_json: bool) -> int:
    """Make a key; its secret is all that goes to standard output, so that it can be taken from there."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            made = await octo.create_key(name, scope=scope, tenant=tenant)
        if as_json:
            print(msgspec.json.encode(made).decode(), flush=True)
            return EXIT_DONE
        messages().print(Text(f"Key {made.key.id} ({made.key.name}: {made.key.scope}). It is shown this once:"))
        print(made.secret, flush=True)
        return EXIT_DONE

    return run_command(work)


def list_keys_command(*, as_json: bool) -> int:
    """List keys."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            keys = await octo.keys()
        if as_json:
            print(msgspec.json.encode(KeyList(keys)).decode())
            return EXIT_DONE
        table = Table(box=None)
        for column in ("Id", "Name", "Scope", "Made", "Last used", "State"):
            table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
        for key in keys:
            state = "revoked" if key.revoked_at else "good"
            table.add_row(
                key.id, Text(key.name), Text(key.scope), key.created_at[:10], (key.last_used_at or "")[:10], state
            )
        output().print(table)
        return EXIT_DONE

    return run_command(work)


def revoke_key_command(key_id: str, *, as_json: bool) -> int:
    """Revoke a key."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            await octo.revoke_key(key_id)
        if as_json:
            print(msgspec.json.encode({"id": key_id, "state": "revoked"}).decode())
        else:
            output().print(Text(f"Key {key_id} is revoked."))
        return EXIT_DONE

    return run_command(work)


def mint_token_command(scope: str, aud: str, lifetime: int, *, as_json: bool) -> int:
    """Print a token alone."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            answer = await octo.mint_token(scope, aud=aud, lifetime_seconds=lifetime)
        print(msgspec.json.encode(answer).decode() if as_json else answer.access_token, flush=True)
        return EXIT_DONE

    return run_command(work)
