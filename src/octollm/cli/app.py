"""Every command and its options. What a command does is in a module of its own, imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octollm import __version__
from octollm.cli.arms import arms_app
from octollm.cli.audit import audit_app
from octollm.cli.completion import complete_service
from octollm.cli.keys import keys_app, models_app, token_app
from octollm.cli.new import new_app
from octollm.cli.tasks import TaskId, events_app, task_app

DEMO_GOAL = "Write a Python function is_palindrome(text) with tests"
"""What `octollm demo` asks for when it is given nothing else."""

app = typer.Typer(
    name="octollm",
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
app.add_typer(task_app, rich_help_panel="Tasks")
app.add_typer(events_app, rich_help_panel="Tasks")
app.add_typer(arms_app, rich_help_panel="Installation")
app.add_typer(models_app, rich_help_panel="Installation")
app.add_typer(keys_app, rich_help_panel="Access")
app.add_typer(token_app, rich_help_panel="Access")
app.add_typer(audit_app, rich_help_panel="Access")
app.add_typer(new_app, rich_help_panel="Arms")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"octollm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that belong to no command."""


@app.command(rich_help_panel="Start")
def demo(
    goal: Annotated[str, typer.Argument(help="What the team is to do.")] = DEMO_GOAL,
) -> None:
    """Start everything in this process, do one goal live, save the result, and stop."""
    from octollm.cli.tasks import demo_command  # noqa: PLC0415

    raise typer.Exit(demo_command(goal))


@app.command(rich_help_panel="Start")
def up(
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm", help="An arm of your own as module:name, served too; may be given several times.", metavar="ARM"
        ),
    ] = None,
) -> None:
    """Run every service on this machine until Ctrl-C."""
    from octollm.cli.tasks import up_command  # noqa: PLC0415

    raise typer.Exit(up_command(arm or []))


@app.command(rich_help_panel="Tasks")
def run(
    goal: Annotated[str, typer.Argument(help="What the team is to do.", metavar="GOAL")],
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="A file that the goal is about; may be given several times.", metavar="PATH"),
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option("--criterion", "-c", help="What the result has to satisfy; may be given several times."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that the task may use.", min=1)] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds that the task may take.", min=1)] = None,
    max_cost: Annotated[float | None, typer.Option(help="US dollars that the task may cost.", min=0)] = None,
    start: Annotated[
        bool, typer.Option(help="Where none runs on this machine, start an installation for this goal alone.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to standard output, and the rest to standard error.")
    ] = False,
) -> None:
    """Give a goal to the installation that runs, watch it live, and save the result to ./octollm-results.

    Where none runs, one is started in this process for the goal, and stopped after it; never with OCTOLLM_URL set.
    Ctrl-C cancels the task. The exit code is 0 only when the task completed.
    """
    from octollm.cli.tasks import run_goal_command  # noqa: PLC0415
    from octollm.contracts.task import Budget  # noqa: PLC0415

    budget = Budget(max_tokens=max_tokens, max_cost_usd=max_cost, max_time_seconds=max_seconds)
    raise typer.Exit(run_goal_command(goal, file or [], criterion or [], budget, as_json=as_json, start=start))


@app.command(rich_help_panel="Start")
def serve(
    service: Annotated[
        str,
        typer.Argument(
            help="A built-in service, e.g. coder; or an arm of your own as module:name, e.g. my_arm:arm.",
            autocompletion=complete_service,
        ),
    ],
    port: Annotated[
        int | None,
        typer.Option(help="Listen on this port, in place of OCTOLLM_PORT.", min=1, max=65535, metavar="PORT"),
    ] = None,
) -> None:
    """Serve one service, or an arm of your own, in this process until SIGTERM or Ctrl-C, which drains it.

    Everything is set by environment variables. It waits for what it needs (OCTOLLM_STARTUP_TIMEOUT), says for what, and
    writes its log as JSON lines to standard error. An arm of your own joins the first time, with OCTOLLM_ENROLMENT_TOKEN
    (`octollm keys join`); beside an installation of your own on this machine it needs none.
    """
    from octollm.cli.serve import serve_command  # noqa: PLC0415

    raise typer.Exit(serve_command(service, port))


@app.command(rich_help_panel="Tasks")
def watch(
    task_id: TaskId,
    as_json: Annotated[bool, typer.Option("--json", help="Print each frame as one line of JSON.")] = False,
) -> None:
    """Follow a task live, from its beginning, and save its result; Ctrl-C leaves it running."""
    from octollm.cli.tasks import watch_command  # noqa: PLC0415

    raise typer.Exit(watch_command(task_id, as_json=as_json))


@app.command(rich_help_panel="Tasks")
def trace(
    task_id: TaskId,
    everything: Annotated[
        bool, typer.Option("--all", help="Show the services' own bookkeeping too: budgets, keys, the directory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the spans as JSON.")] = False,
) -> None:
    """Show where the time of a task went: every call of every service, as a tree with its failures and tokens."""
    from octollm.cli.traces import trace_command  # noqa: PLC0415

    raise typer.Exit(trace_command(task_id, show_internal=everything, as_json=as_json))


@app.command(rich_help_panel="Installation")
def migrate(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bring the tables of every service to this version, in the database that OCTOLLM_DATABASE_URL names.

    Run it once before services of a new version start; those of the version before go on working meanwhile. Each
    service's schema changes whole or not at all. Services on SQLite do it by themselves.
    """
    from octollm.cli.serve import migrate_command  # noqa: PLC0415

    raise typer.Exit(migrate_command(as_json=as_json))


@app.command(rich_help_panel="Installation")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at everything that an installation needs, and say what to do about what is wrong.

    Looks at Python, the settings, the home, disk and ports, the model, the sandbox, Redis, and every service that
    runs. Each check ends within 20 seconds. The exit code is 1 when something is broken; warnings leave it 0.
    """
    from octollm.cli.doctor import doctor_command  # noqa: PLC0415

    raise typer.Exit(doctor_command(as_json=as_json))


@app.command(rich_help_panel="Installation")
def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting: its value (secrets masked), and where it comes from."""
    from octollm.cli.config import config_command  # noqa: PLC0415

    raise typer.Exit(config_command(as_json=as_json))
