"""The command group: every top-level command by name, each imported only when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from octollm import __version__

COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("up", "Start", "Start every service in this process, run one goal, save the result, and stop."),
    "up": ("up", "Start", "Run every service on this machine until Ctrl-C."),
    "run": ("tasks", "Tasks", "Submit a goal, watch it live, and save the result to ./octollm-results."),
    "serve": (
        "serve",
        "Start",
        "Serve one service, or an arm of your own, until SIGTERM or Ctrl-C, which drains it.",
    ),
    "watch": ("tasks", "Tasks", "Follow a task live from its beginning and save its result; Ctrl-C leaves it running."),
    "trace": (
        "traces",
        "Tasks",
        "Show where the time of a task went: every call of every service, as a tree, and what the task waited for.",
    ),
    "migrate": (
        "serve",
        "Installation",
        "Migrate the schemas of every service to this version, in the database that OCTOLLM_DATABASE_URL names.",
    ),
    "archive": (
        "serve",
        "Installation",
        "Delete events, tasks, files and audit rows past their retention now; archive them in OCTOLLM_ARCHIVE_URL.",
    ),
    "top": (
        "top",
        "Installation",
        "Show the services and the open tasks live; q quits. Without a terminal: once.",
    ),
    "doctor": ("doctor", "Installation", "Check everything that an installation needs, and suggest fixes."),
    "config": ("config", "Installation", "Show every setting: its value (secrets masked) and where it comes from."),
    "task": ("tasks", "Tasks", "List, show, steer, cancel and repeat tasks."),
    "schedule": ("schedules", "Tasks", "Submit goals at the times of a cron expression."),
    "memory": ("memory", "Tasks", "Facts and documents: set, search and erase them."),
    "events": ("events", "Tasks", "Follow the event log; durable subscriptions."),
    "arms": (
        "arms",
        "Installation",
        "List the arms: what each does, which operations it offers and calls, and its addresses.",
    ),
    "webhooks": ("webhooks", "Installation", "Manage webhooks, which deliver events to other systems."),
    "hooks": ("hooks", "Installation", "Manage hooks, which start tasks from other systems' webhooks."),
    "models": ("models", "Installation", "Fetch and list the embedded models."),
    "keys": ("keys", "Access", "Manage API keys, signing keys and enrolment tokens."),
    "token": ("tokens", "Access", "Make API keys, and tokens for direct calls; inspect and revoke them."),
    "audit": ("audit", "Access", "Export the audit log, and check that nothing in it was changed."),
    "new": ("new", "Arms", "Make a package to begin with."),
}
"""Module of this package, help panel and short help of each top-level command, in the order of the help page.

A test compares panel and help with the commands themselves.
"""


class LazyGroup(TyperGroup):
    """A group that imports the module of a command when the command is called.

    Help and completion of the top level use ``COMMANDS`` alone: importing every module takes seconds.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the top-level commands, in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the loaded command, else a stub with its help; ``None`` for an unknown name."""
        if cmd_name in self.commands or cmd_name not in COMMANDS:
            return self.commands.get(cmd_name)
        _module, panel, text = COMMANDS[cmd_name]
        return TyperCommand(cmd_name, help=text, rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Load the command that ``args`` name, then resolve it. An unknown name is answered with similar ones."""
        if args and args[0] in COMMANDS:
            self.load(args[0])
        else:
            # typer takes the suggestions from ``commands``.
            self.commands.update({name: self.get_command(ctx, name) for name in COMMANDS})
        return super().resolve_command(ctx, args)

    def load(self, name: str) -> None:
        """Import the module of a command and register the command."""
        module = import_module(f"octollm.cli.{COMMANDS[name][0]}")
        self.commands[name] = typer.main.get_group(module.app).commands[name]


app = typer.Typer(
    name="octollm",
    cls=LazyGroup,
    help="Run a team of LLM agents as secure, observable services.\n\n"
    "Start one installation with [bold]octollm up[/], give it goals with [bold]octollm run[/].",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. "
    "Settings are environment variables OCTOLLM_*: see `octollm config`. Something does not work: `octollm doctor`.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"octollm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declare the options that belong to no command."""


def load_commands() -> LazyGroup:
    """Return the group with every command loaded, for tools that walk the tree of commands."""
    group = typer.main.get_command(app)
    assert isinstance(group, LazyGroup)
    for name in COMMANDS:
        group.load(name)
    return group
