"""`octollm audit`: export the audit log, and verify its hash chain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from octollm.capability import PublicKey
from octollm.capability.audit_chain import AuditChainError, AuditChainVerifier
from octollm.cli.output import output
from octollm.cli.runtime import (
    EXIT_DONE,
    EXIT_FAILED,
    AsJson,
    async_command,
    command_settings,
    open_client,
    print_json,
)
from octollm.client import AsyncClient
from octollm.contracts.observability import AuditHead, AuditRow
from octollm.errors import OctoError, map_file_errors
from octollm.installation.provisioning import load_trusted_roots

_PAGE = 500

app = typer.Typer()
audit_app = typer.Typer(name="audit", help="Export the audit log, and check that nothing in it was changed.")
app.add_typer(audit_app, rich_help_panel="Access")

SystemOption = Annotated[
    bool, typer.Option("--system", help="The rows of no tenant, such as credentials that were refused.")
]


class _ExportTrailer(msgspec.Struct, frozen=True):
    """The last line of an export."""

    head: AuditHead


class AuditReport(msgspec.Struct, frozen=True):
    """The result of verifying an audit log; ``faults`` is empty when its chain is intact."""

    tenant: str
    rows: int
    head: AuditHead
    faults: tuple[AuditChainError, ...]


@audit_app.command("export")
@async_command
async def export_log(system: SystemOption = False) -> int:
    """Print the audit log of your tenant, a JSON object a line; the last line is the head of its chain."""
    async with open_client(command_settings()) as client:
        async for line in _fetch_lines(client, system=system):
            print(msgspec.json.encode(_ExportTrailer(line) if isinstance(line, AuditHead) else line).decode())
    return EXIT_DONE


@audit_app.command("verify")
@async_command
async def verify_log(
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
    as_json: AsJson = False,
) -> int:
    """Verify the hash chain of the audit log, and name every row that was changed, removed or moved.

    With an earlier export, a log whose end was cut off is detected, too. Exit code 1 when something is wrong.
    """
    settings = command_settings()
    verifier = _LogVerifier(load_trusted_roots(settings, roots), None if against is None else _read_head(against))
    if file is not None:
        for line in _read_export(file):
            verifier.check(line)
    else:
        async with open_client(settings) as client:
            async for line in _fetch_lines(client, system=system):
                verifier.check(line)
    report = verifier.report()
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    return EXIT_FAILED if report.faults else EXIT_DONE


class _LogVerifier:
    """Verifies one log line by line; ``earlier`` is the head of an earlier export."""

    def __init__(self, roots: Mapping[str, PublicKey], earlier: AuditHead | None) -> None:
        self._roots = roots
        self._earlier = earlier
        self._contains_earlier = earlier is None or earlier.seq == 0
        self._chain: AuditChainVerifier | None = None
        self._head: AuditHead | None = None

    def check(self, line: AuditRow | AuditHead) -> None:
        """Verify the next line."""
        if self._chain is None:
            self._chain = AuditChainVerifier(line.tenant, self._roots)
        if isinstance(line, AuditHead):
            self._head = line
            return
        self._chain.check_row(line)
        if self._earlier is not None and line.seq == self._earlier.seq:
            self._contains_earlier = line.hash == self._earlier.hash

    def report(self) -> AuditReport:
        """Return the report; raise ``file_invalid`` when the log had no head."""
        if self._chain is None or self._head is None:
            raise OctoError("The export has no last line that says where the log ends.", code="file_invalid")
        self._chain.check_head(self._head)
        faults = list(self._chain.faults)
        if self._earlier is not None and not self._contains_earlier:
            faults.append(AuditChainError(self._earlier.seq, "the earlier export ends there with another row"))
        return AuditReport(self._head.tenant, self._chain.rows, self._head, tuple(faults))


def _print_report(report: AuditReport) -> None:
    console = output()
    for fault in report.faults:
        place = f"row {fault.seq}" if fault.seq else "the end"
        console.print(Text(f"✗ {place}: {fault.what}", "octo.bad"))
    rows = f"{report.rows} row{'' if report.rows == 1 else 's'} of {report.tenant}"
    if report.faults:
        console.print(Text(f"{rows}: not as they were sealed."))
    else:
        console.print(Text(f"✓ {rows}, as they were sealed. The chain stands at {report.head.hash or 'nothing'}."))


async def _fetch_lines(client: AsyncClient, *, system: bool) -> AsyncIterator[AuditRow | AuditHead]:
    """Yield every row up to the head of the first page, and then that head: rows that come later are left out."""
    first = await client.admin.audit(limit=_PAGE, system=system)
    page, after = first, 0
    while page.rows and after < first.head.seq:
        for row in page.rows:
            if row.seq <= first.head.seq:
                yield row
        after = page.rows[-1].seq
        if after < first.head.seq:
            page = await client.admin.audit(after=after, limit=_PAGE, system=system)
    yield first.head


def _read_export(file: Path) -> Iterator[AuditRow | AuditHead]:
    with map_file_errors(file, "read", code="file_invalid"), file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = (
                    msgspec.json.decode(line, type=_ExportTrailer).head
                    if line.startswith(b'{"head"')
                    else msgspec.json.decode(line, type=AuditRow)
                )
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise OctoError(f"{file}, line {number}, is no audit row: {error}", code="file_invalid") from error
            yield row


def _read_head(file: Path) -> AuditHead:
    head: AuditHead | None = None
    for line in _read_export(file):
        head = line if isinstance(line, AuditHead) else AuditHead(line.tenant, line.seq, line.hash)
    if head is None:
        raise OctoError(f"{file} has no line.", code="file_invalid")
    return head
