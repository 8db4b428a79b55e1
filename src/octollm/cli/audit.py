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
from octollm.cli.runtime import EXIT_DONE, EXIT_FAILED, command_settings, open_client, run_command
from octollm.client import AsyncClient
from octollm.contracts.observability import AuditHead, AuditRow
from octollm.errors import OctoError
from octollm.installation.provisioning import load_trusted_roots

audit_app = typer.Typer(name="audit", help="Export the audit log, and check that nothing in it was changed.")

SystemOption = Annotated[
    bool, typer.Option("--system", help="The rows of no tenant, such as credentials that were refused.")
]


@audit_app.command("export")
def export_log(system: SystemOption = False) -> None:
    """Print the audit log of your tenant, a JSON object a line, and where its chain stands on the last line."""
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
    raise typer.Exit(verify_command(file, roots=roots, against=against, system=system, as_json=as_json))


_PAGE = 500


class _ExportTrailer(msgspec.Struct, frozen=True):
    """The last line of an export."""

    head: AuditHead


class AuditReport(msgspec.Struct, frozen=True):
    """What a check found."""

    tenant: str
    rows: int
    head: AuditHead
    faults: tuple[AuditChainError, ...]


def export_command(*, system: bool) -> int:
    """Print every row and the head."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            async for line in _fetch_lines(octo, system=system):
                print(msgspec.json.encode(_ExportTrailer(line) if isinstance(line, AuditHead) else line).decode())
        return EXIT_DONE

    return run_command(work)


def verify_command(file: Path | None, *, roots: Path | None, against: Path | None, system: bool, as_json: bool) -> int:
    """Check an export, or what the installation answers."""

    async def work() -> int:
        settings = command_settings()
        reading = _LogVerifier(load_trusted_roots(settings, roots), None if against is None else _read_head(against))
        if file is not None:
            for line in _read_export(file):
                reading.check(line)
        else:
            async with open_client(settings) as octo:
                async for line in _fetch_lines(octo, system=system):
                    reading.check(line)
        verdict = reading.report()
        if as_json:
            print(msgspec.json.encode(verdict).decode())
        else:
            _print_report(verdict)
        return EXIT_FAILED if verdict.faults else EXIT_DONE

    return run_command(work)


class _LogVerifier:
    """The check of one log while its lines are read; ``earlier`` is where an earlier export of it ended."""

    def __init__(self, roots: Mapping[str, PublicKey], earlier: AuditHead | None) -> None:
        self._roots = roots
        self._earlier = earlier
        self._contains_earlier = earlier is None or earlier.seq == 0
        self._chain: AuditChainVerifier | None = None
        self._head: AuditHead | None = None

    def check(self, line: AuditRow | AuditHead) -> None:
        """Check a line."""
        if self._chain is None:
            self._chain = AuditChainVerifier(line.tenant, self._roots)
        if isinstance(line, AuditHead):
            self._head = line
            return
        self._chain.check_row(line)
        if self._earlier is not None and line.seq == self._earlier.seq:
            self._contains_earlier = line.hash == self._earlier.hash

    def report(self) -> AuditReport:
        """Return what was found; raise ``file_invalid`` when there was no whole log."""
        if self._chain is None or self._head is None:
            raise OctoError("The export has no last line that says where the log ends.", code="file_invalid")
        self._chain.check_head(self._head)
        faults = list(self._chain.faults)
        if self._earlier is not None and not self._contains_earlier:
            faults.append(AuditChainError(self._earlier.seq, "the earlier export ends there with another row"))
        return AuditReport(self._head.tenant, self._chain.rows, self._head, tuple(faults))


def _print_report(verdict: AuditReport) -> None:
    console = output()
    for fault in verdict.faults:
        place = f"row {fault.seq}" if fault.seq else "the end"
        console.print(Text(f"✗ {place}: {fault.what}", "octo.bad"))
    rows = f"{verdict.rows} row{'' if verdict.rows == 1 else 's'} of {verdict.tenant}"
    if verdict.faults:
        console.print(Text(f"{rows}: not as they were sealed."))
    else:
        console.print(Text(f"✓ {rows}, as they were sealed. The chain stands at {verdict.head.hash or 'nothing'}."))


async def _fetch_lines(octo: AsyncClient, *, system: bool) -> AsyncIterator[AuditRow | AuditHead]:
    """Yield every row up to the head of the moment, and then that."""
    first = await octo.audit(limit=_PAGE, system=system)
    page, after = first, 0
    while page.rows and after < first.head.seq:
        for row in page.rows:
            if row.seq <= first.head.seq:
                yield row
        after = page.rows[-1].seq
        if after < first.head.seq:
            page = await octo.audit(after=after, limit=_PAGE, system=system)
    yield first.head


def _read_export(file: Path) -> Iterator[AuditRow | AuditHead]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield (
                        msgspec.json.decode(line, type=_ExportTrailer).head
                        if line.startswith(b'{"head"')
                        else (msgspec.json.decode(line, type=AuditRow))
                    )
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise OctoError(f"{file}, line {number}, is no audit row: {error}", code="file_invalid") from error
    except OSError as error:
        raise OctoError(f"{file} cannot be read: {error.strerror}.", code="file_invalid") from error


def _read_head(file: Path) -> AuditHead:
    head: AuditHead | None = None
    for line in _read_export(file):
        head = line if isinstance(line, AuditHead) else AuditHead(line.tenant, line.seq, line.hash)
    if head is None:
        raise OctoError(f"{file} has no line.", code="file_invalid")
    return head
