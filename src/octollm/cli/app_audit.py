"""The commands on the audit log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

audit_app = typer.Typer(name="audit", help="Export the audit log, and check that nothing in it was changed.")

SystemOption = Annotated[
    bool, typer.Option("--system", help="The rows of no tenant, such as credentials that were refused.")
]


@audit_app.command("export")
def export_log(system: SystemOption = False) -> None:
    """Print the audit log of your tenant, a JSON object a line, and where its chain stands on the last line."""
    from octollm.cli.audit_views import export_command  # noqa: PLC0415

    raise typer.Exit(export_command(system=system))


@audit_app.command("verify")
def verify_log(
    file: Annotated[
        Path | None, typer.Argument(help="An export; else the installation is asked.", metavar="[EXPORT]")
    ] = None,
    roots: Annotated[
        Path | None,
        typer.Option(help="The root keys to trust, a JWK Set; else those of this machine.", metavar="PATH"),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="An earlier export that the log must begin with.", metavar="EXPORT"),
    ] = None,
    system: SystemOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the chain of the audit log: every row that was changed, removed or moved is named.

    An earlier export shows, too, when the end of the log was cut off. Exit code 1 when something is wrong.
    """
    from octollm.cli.audit_views import verify_command  # noqa: PLC0415

    raise typer.Exit(verify_command(file, roots=roots, against=against, system=system, as_json=as_json))
