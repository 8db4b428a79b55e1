"""`octollm keys join`, `joins` and `revoke-join`."""

from __future__ import annotations

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli.door import open_client
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output
from octollm.contracts.joining import EnrolmentTokenList


def create_enrolment_token_command(name: str, calls: str, lifetime: int, *, as_json: bool) -> int:
    """Make a join secret; it is all that goes to standard output, so that it can be taken from there."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            made = await octo.create_enrolment_token(name, calls=calls.split(), lifetime_seconds=lifetime)
        if as_json:
            print(msgspec.json.encode(made).decode(), flush=True)
            return EXIT_DONE
        admitted = ", ".join(made.join.calls) or "no calls"
        messages().print(
            Text(
                f"Join secret {made.join.id} for {made.join.name} ({admitted}), until {made.join.expires_at}."
                " Give it to the arm as OCTOLLM_JOIN_SECRET. It is shown this once:"
            )
        )
        print(made.secret, flush=True)
        return EXIT_DONE

    return run_command(work)


def list_enrolment_tokens_command(*, as_json: bool) -> int:
    """List join secrets."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            found = EnrolmentTokenList(await octo.enrolment_tokens())
        if as_json:
            print(msgspec.json.encode(found).decode())
            return EXIT_DONE
        table = Table(box=None)
        for column in ("Id", "Arm", "Calls", "Until", "Used", "State"):
            table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
        for join in found.joins:
            calls, used = ", ".join(join.calls), (join.used_at or "")[:10]
            table.add_row(join.id, Text(join.name), Text(calls), join.expires_at[:16], used, join.state)
        output().print(table)
        return EXIT_DONE

    return run_command(work)


def revoke_enrolment_token_command(token_id: str, *, as_json: bool) -> int:
    """Revoke a join secret."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            await octo.revoke_enrolment_token(token_id)
        if as_json:
            print(msgspec.json.encode({"id": token_id, "state": "revoked"}).decode())
        else:
            output().print(Text(f"Join secret {token_id} is revoked. An arm that joined with it stays."))
        return EXIT_DONE

    return run_command(work)
