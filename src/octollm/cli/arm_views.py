"""`octollm arms`."""

from __future__ import annotations

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli.door import open_client
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.contracts.api import ArmList, ArmView
from octollm.errors import OctoError


def arms_command(name: str | None, *, as_json: bool) -> int:
    """List the arms, or tell all about one."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            arms = await octo.arms()
        if name is not None:
            _print_arm(_find_arm(name, arms), as_json=as_json)
        elif as_json:
            print(msgspec.json.encode(ArmList(arms)).decode())
        else:
            _print_table(arms)
        return EXIT_DONE

    return run_command(work)


def remove_command(name: str, *, as_json: bool) -> int:
    """Remove an arm of one's own."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            await octo.remove_arm(name)
        if as_json:
            print(msgspec.json.encode({"name": name, "state": "removed"}).decode())
        else:
            output().print(Text(f"The arm {name} is removed: what it holds is worth nothing here, its name is free."))
        return EXIT_DONE

    return run_command(work)


def _find_arm(name: str, arms: tuple[ArmView, ...]) -> ArmView:
    for arm in arms:
        if arm.name == name:
            return arm
    known = ", ".join(arm.name for arm in arms) or "none"
    raise OctoError(f"There is no arm {name}; registered: {known}.", code="arm_unknown")


def _print_table(arms: tuple[ArmView, ...]) -> None:
    table = Table(box=None)
    for column in ("Arm", "State", "Operations", "Address"):
        table.add_column(column, no_wrap=True)
    table.add_column("What it does", overflow="fold")
    for arm in arms:
        table.add_row(
            arm.name, arm.state, ", ".join(arm.operations), " ".join(arm.urls) or arm.url, Text(arm.description)
        )
    output().print(table)


def _print_arm(arm: ArmView, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(arm).decode())
        return
    console = output()
    rows = {
        "Arm": arm.name,
        "Does": arm.description,
        "Offers": ", ".join(f"{arm.name}:{operation}" for operation in arm.operations),
        "Calls": ", ".join(arm.calls) or "nothing",
        "Address": ", ".join(arm.urls) or f"none now (last {arm.url})",
        "State": arm.state,
        "Since": arm.registered_at,
    }
    for label, value in rows.items():
        console.print(Text.assemble((f"{label:<8}", "octo.title"), value))
