"""`octollm keys rotate`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from rich.text import Text

from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.clock import SystemClock, Uuid7Generator, format_rfc3339
from octollm.installation.home import open_keys
from octollm.installation.rotating import ROOT, KeyRotationResult, rotate_signing_key


def rotate_command(name: str, folder: Path | None, *, at_once: bool, as_json: bool) -> int:
    """Make a new key, and say what to do next."""

    async def work() -> int:
        clock = SystemClock()
        ids = Uuid7Generator(clock)
        if folder is not None:
            done = await asyncio.to_thread(rotate_signing_key, folder, name, ids, clock.now(), is_compromised=at_once)
        else:
            async with open_keys(command_settings().home) as home:
                done = await asyncio.to_thread(
                    rotate_signing_key, home.keys, name, ids, clock.now(), is_compromised=at_once
                )
        if as_json:
            print(msgspec.json.encode(done, enc_hook=str).decode())
        else:
            _print_rotation(done, is_compromised=at_once)
        return EXIT_DONE

    return run_command(work)


def _print_rotation(done: KeyRotationResult, *, at_once: bool) -> None:
    console = output()
    for path in done.written:
        console.print(Text(f"Wrote {path}"))
    console.print(Text(f"The new key of {done.name} is {done.fresh}."))
    order = "the orchestrator" if done.name in (ROOT, "orchestrator") else f"the orchestrator, then {done.name}"
    if at_once:
        console.print(Text(f"Start {order} again now: {done.before} is believed no more.", "octo.warn"))
        if done.name == ROOT:
            every = "Start every other service again, too. Tokens, join secrets and grants of the old key are over."
            console.print(Text(every, "octo.warn"))
        else:
            lent = f"End what was lent to the old key: octollm token revoke --service {done.name}"
            console.print(Text(lent, "octo.warn"))
        return
    console.print(
        Text(f"Start {order} again before {format_rfc3339(done.signs_at)[:19]}Z, when the new key begins to sign.")
    )
    console.print(Text(f"{done.before} is believed until {format_rfc3339(done.until)[:19]}Z.", "octo.quiet"))
