"""`octollm arms`: list the arms, show one, remove one. `octollm arms NAME` is short for `arms show NAME`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer._click.shell_completion import CompletionItem  # pyright: ignore[reportPrivateUsage]  typer's own click
from typer.core import TyperGroup

from octollm.cli.completion import complete_arm
from octollm.cli.output import output
from octollm.cli.runtime import (
    EXIT_DONE,
    AsJson,
    async_command,
    command_settings,
    open_client,
    print_json,
    run_command,
)
from octollm.contracts.enrolment import ArmList, ArmView
from octollm.errors import OctoError

app = typer.Typer()

ArmName = Annotated[str, typer.Argument(help="The arm's name.", metavar="NAME", autocompletion=complete_arm)]


class _ArmsGroup(TyperGroup):
    """A group in which a word that is no command is the name of an arm."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that ``args`` name; ``show`` for the name of an arm."""
        is_command = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if is_command else ["show", *args])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """Offer commands and arms."""
        arms = [CompletionItem(name, help=about) for name, about in complete_arm(incomplete)]
        return [*super().shell_complete(ctx, incomplete), *arms]


arms_app = typer.Typer(name="arms", cls=_ArmsGroup, invoke_without_command=True)


@arms_app.callback()
def list_arms(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the arms: what each does, which operations it offers and calls, and its addresses."""
    if ctx.invoked_subcommand is not None:
        return

    async def work() -> int:
        async with open_client(command_settings()) as client:
            arms = await client.arms()
        if as_json:
            print_json(ArmList(arms))
        else:
            _print_table(arms)
        return EXIT_DONE

    raise typer.Exit(run_command(work))


app.add_typer(arms_app, rich_help_panel="Installation")


@arms_app.command("show")
@async_command
async def show_arm(name: ArmName, as_json: AsJson = False) -> int:
    """Show everything about one arm; `octollm arms NAME` does the same."""
    async with open_client(command_settings()) as client:
        arm = _find_arm(name, await client.arms())
    if as_json:
        print_json(arm)
    else:
        _print_arm(arm)
    return EXIT_DONE


@arms_app.command("remove")
@async_command
async def remove_arm(name: ArmName, as_json: AsJson = False) -> int:
    """Remove an arm of your own: its keys, enrolment tokens and grants are revoked, and its name is free."""
    async with open_client(command_settings()) as client:
        await client.admin.remove_arm(name)
    if as_json:
        print_json({"name": name, "state": "removed"})
    else:
        output().print(Text(f"The arm {name} is removed: its keys and grants are revoked, and its name is free."))
    return EXIT_DONE


def _find_arm(name: str, arms: tuple[ArmView, ...]) -> ArmView:
    for arm in arms:
        if arm.name == name:
            return arm
    names = ", ".join(arm.name for arm in arms) or "none"
    raise OctoError(f"There is no arm {name}; registered: {names}.", code="arm_unknown")


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


def _print_arm(arm: ArmView) -> None:
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
