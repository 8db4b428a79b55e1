"""`octollm arms`: list the arms, show one, remove one. `octollm arms NAME` is short for `arms show NAME`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table
from rich.text import Text
from typer._click.shell_completion import CompletionItem  # pyright: ignore[reportPrivateUsage]
from typer.core import TyperGroup

from octollm.cli.completion import complete_arm
from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, command_settings, open_client, run_command
from octollm.contracts.enrolment import ArmList, ArmView
from octollm.errors import OctoError

# typer carries its own copy of click and gives this class no public name.


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ArmName = Annotated[str, typer.Argument(help="The arm's name.", metavar="NAME", autocompletion=complete_arm)]


class _ArmsGroup(TyperGroup):
    """A group in which a word that is no command is the name of an arm."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the words name; ``show`` for an arm's name."""
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["show", *args])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """Offer commands and arms."""
        arms = [CompletionItem(name, help=about) for name, about in complete_arm(incomplete)]
        return [*super().shell_complete(ctx, incomplete), *arms]


arms_app = typer.Typer(name="arms", cls=_ArmsGroup, invoke_without_command=True)


@arms_app.callback()
def list_arms(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the arms: what each does, what it offers and calls, and where it answers."""
    if ctx.invoked_subcommand is None:
        raise typer.Exit(arms_command(None, as_json=as_json))


@arms_app.command("show")
def show_arm(name: ArmName, as_json: AsJson = False) -> None:
    """Tell all about one arm; `octollm arms NAME` does the same."""
    raise typer.Exit(arms_command(name, as_json=as_json))


@arms_app.command("remove")
def remove_arm(name: ArmName, as_json: AsJson = False) -> None:
    """Remove an arm of one's own: its key, its join secrets and what it was lent end, and its name is free."""
    raise typer.Exit(remove_command(name, as_json=as_json))


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
