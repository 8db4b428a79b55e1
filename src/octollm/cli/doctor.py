"""`octollm doctor`: look at everything that an installation needs, and say what to do."""

from __future__ import annotations

from functools import partial

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli import check_machine, check_servers
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE, EXIT_FAILED
from octollm.cli.findings import Check, Finding, look_at
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output
from octollm.config import Settings

_SIGNS = {"ok": ("✓", "octo.good"), "warning": ("!", "octo.warn"), "broken": ("✗", "octo.bad")}


def checks_of(settings: Settings) -> list[Check]:
    """Return every check, in the order in which they are told."""
    return [
        Check("python", check_machine.python_version),
        Check("settings", check_machine.unread_settings),
        Check("home", partial(check_machine.home, settings)),
        Check("ports", partial(check_machine.ports, settings)),
        Check("model", partial(check_machine.model, settings)),
        Check("sandbox", partial(check_machine.sandbox, settings)),
        Check("redis", partial(check_servers.redis, settings)),
        Check("database", partial(check_servers.database, settings)),
        Check("services", partial(check_servers.services, settings)),
    ]


def doctor_command(*, as_json: bool) -> int:
    """Print what every check found; exit code 1 when something is broken."""

    async def work() -> int:
        settings = command_settings(warn=False)
        with messages().status("Looking"):
            found = await look_at(checks_of(settings))
        if as_json:
            print(msgspec.json.encode(found).decode())
        else:
            _show(found)
        return EXIT_FAILED if any(finding.level == "broken" for finding in found) else EXIT_DONE

    return run_command(work)


def _show(found: list[Finding]) -> None:
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        sign, style = _SIGNS[finding.level]
        said = Text(finding.found)
        if finding.todo:
            said.append(f"\n{finding.todo}", "octo.warn")
        table.add_row(Text(sign, style), Text(finding.check, "octo.title"), said)
    console = output()
    console.print(table)
    broken = sum(finding.level == "broken" for finding in found)
    warned = sum(finding.level == "warning" for finding in found)
    if broken or warned:
        console.print(Text(f"{broken} broken, {warned} to look at"))
    else:
        console.print(Text("All is well.", "octo.good"))
