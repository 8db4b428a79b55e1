"""`octollm doctor`: look at everything that an installation needs, and say what to do."""

from __future__ import annotations

from functools import partial

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli import check_machine, check_servers
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE, EXIT_FAILED
from octollm.cli.findings import CheckResult, DiagnosticCheck, run_checks
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output
from octollm.config import Settings

_SYMBOLS = {"ok": ("✓", "octo.good"), "warning": ("!", "octo.warn"), "broken": ("✗", "octo.bad")}


def build_checks(settings: Settings) -> list[DiagnosticCheck]:
    """Return every check, in the order in which they are told."""
    return [
        DiagnosticCheck("python", check_machine.check_python),
        DiagnosticCheck("settings", check_machine.check_settings),
        DiagnosticCheck("home", partial(check_machine.check_home, settings)),
        DiagnosticCheck("ports", partial(check_machine.check_ports, settings)),
        DiagnosticCheck("model", partial(check_machine.check_model, settings)),
        DiagnosticCheck("sandbox", partial(check_machine.check_sandbox, settings)),
        DiagnosticCheck("redis", partial(check_servers.check_redis, settings)),
        DiagnosticCheck("database", partial(check_servers.check_database, settings)),
        DiagnosticCheck("services", partial(check_servers.check_services, settings)),
    ]


def doctor_command(*, as_json: bool) -> int:
    """Print what every check found; exit code 1 when something is broken."""

    async def work() -> int:
        settings = command_settings(warn=False)
        with messages().status("Looking"):
            found = await run_checks(build_checks(settings))
        if as_json:
            print(msgspec.json.encode(found).decode())
        else:
            _print_results(found)
        return EXIT_FAILED if any(finding.level == "broken" for finding in found) else EXIT_DONE

    return run_command(work)


def _print_results(results: list[CheckResult]) -> None:
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in results:
        sign, style = _SYMBOLS[finding.level]
        said = Text(finding.found)
        if finding.todo:
            said.append(f"\n{finding.todo}", "octo.warn")
        table.add_row(Text(sign, style), Text(finding.check, "octo.title"), said)
    console = output()
    console.print(table)
    broken = sum(finding.level == "broken" for finding in results)
    warned = sum(finding.level == "warning" for finding in results)
    if broken or warned:
        console.print(Text(f"{broken} broken, {warned} to look at"))
    else:
        console.print(Text("All is well.", "octo.good"))
