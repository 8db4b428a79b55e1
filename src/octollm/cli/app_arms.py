"""The commands on arms. `octollm arms NAME` is short for `octollm arms show NAME`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

# typer carries its own copy of click and gives this class no public name.
from typer._click.shell_completion import CompletionItem  # pyright: ignore[reportPrivateUsage]
from typer.core import TyperGroup

from octollm.cli.completing import complete_arm

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
        from octollm.cli.arm_views import arms_command  # noqa: PLC0415

        raise typer.Exit(arms_command(None, as_json=as_json))


@arms_app.command("show")
def show_arm(name: ArmName, as_json: AsJson = False) -> None:
    """Tell all about one arm; `octollm arms NAME` does the same."""
    from octollm.cli.arm_views import arms_command  # noqa: PLC0415

    raise typer.Exit(arms_command(name, as_json=as_json))


@arms_app.command("remove")
def remove_arm(name: ArmName, as_json: AsJson = False) -> None:
    """Remove an arm of one's own: its key, its join secrets and what it was lent end, and its name is free."""
    from octollm.cli.arm_views import remove_command  # noqa: PLC0415

    raise typer.Exit(remove_command(name, as_json=as_json))
