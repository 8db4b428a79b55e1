"""`octollm audit`: export the audit log, and verify its hash chain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
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
from octollm.contracts.observability import AuditCut, AuditHead, AuditRow, AuditTrailer, decode_audit_line
from octollm.errors import OctoError, map_file_errors
from octollm.installation.provisioning import load_trusted_roots

_PAGE = 500

app = typer.Typer()
audit_app = typer.Typer(name="audit", help="Export the audit log, and check that nothing in it was changed.")
app.add_typer(audit_app, rich_help_panel="Access")

SystemOption = Annotated[
    bool, typer.Option("--system", help="The rows of no tenant, such as credentials that were refused.")
]


Line = AuditRow | AuditCut | AuditTrailer
"""A line of an export."""


class AuditReport(msgspec.Struct, frozen=True):
    """The result of verifying an audit log; ``faults`` is empty when its chain is intact.

    ``unverified`` rows at its beginning are in the archive and were not read.
    """

    tenant: str
    rows: int
    head: AuditHead
    faults: tuple[AuditChainError, ...]
    unverified: int = 0


@audit_app.command("export")
@async_command
async def export_log(system: SystemOption = False) -> int:
    """Print the audit log of your tenant, a JSON object a line; the last line is the head of its chain.

    When rows were archived, the first line says where the log begins.
    """
    async with open_client(command_settings()) as client:
        async for line in _fetch_lines(client, system=system):
            print_json(line)
    return EXIT_DONE


@audit_app.command("verify")
@async_command
async def verify_log(
    file: Annotated[
        Path | None, typer.Argument(help="An exported log; by default the log of the installation.", metavar="EXPORT")
    ] = None,
    roots: Annotated[
        Path | None,
        typer.Option(help="The root keys to trust, a JWK Set; else those of this machine.", metavar="PATH"),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="An earlier export that the log must begin with.", metavar="EXPORT"),
    ] = None,
    archive: Annotated[
        str | None,
        typer.Option(help="Where archived rows are; else OCTOLLM_ARCHIVE_URL, if it is set.", metavar="URL"),
    ] = None,
    system: SystemOption = False,
    as_json: AsJson = False,
) -> int:
    """Verify the hash chain of the audit log, and name every row that was changed, removed or moved.

    Archived rows are verified first. Without the archive, the verification begins at the signed row after which the log
    was cut. With an earlier export, a truncated log is detected as well. The exit code is 1 if a check fails.
    """
    settings = command_settings()
    earlier = None if against is None else _read_head(against)
    url = archive or settings.archive_url
    verifier = _LogVerifier(load_trusted_roots(settings, roots), earlier, None if url is None else _load_archive(url))
    if file is not None:
        for line in _read_export(file):
            await verifier.check(line)
    else:
        async with open_client(settings) as client:
            async for line in _fetch_lines(client, system=system):
                await verifier.check(line)
    report = verifier.report()
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    return EXIT_FAILED if report.faults else EXIT_DONE


ReadArchived = Callable[[str, int], AsyncIterator[AuditRow]]
"""Returns the archived rows of a tenant up to one."""


class _LogVerifier:
    """Verifies one log line by line; ``earlier`` is the head of an earlier export."""

    def __init__(
        self, roots: Mapping[str, PublicKey], earlier: AuditHead | None, read_archived: ReadArchived | None
    ) -> None:
        self._roots = roots
        self._earlier = earlier
        self._read_archived = read_archived
        self._contains_earlier = earlier is None or earlier.seq == 0
        self._chain: AuditChainVerifier | None = None
        self._head: AuditHead | None = None
        self._unverified = 0

    async def check(self, line: Line) -> None:
        """Verify the next line."""
        if isinstance(line, AuditTrailer):
            self._head = line.head
            self._chain_of(line.head.tenant)
        elif isinstance(line, AuditCut):
            await self._check_cut(self._chain_of(line.cut.tenant), line.cut)
        else:
            self._check_row(line)

    async def _check_cut(self, chain: AuditChainVerifier, cut: AuditHead) -> None:
        if self._read_archived is None:
            self._unverified = cut.seq
            self._compare(cut.seq, cut.hash)
        else:
            async for row in self._read_archived(cut.tenant, cut.seq):
                self._check_row(row)
        chain.check_cut(cut, archived=self._read_archived is not None)

    def _check_row(self, row: AuditRow) -> None:
        self._chain_of(row.tenant).check_row(row)
        self._compare(row.seq, row.hash)

    def _compare(self, seq: int, digest: str) -> None:
        if self._earlier is not None and seq == self._earlier.seq:
            self._contains_earlier = digest == self._earlier.hash

    def _chain_of(self, tenant: str) -> AuditChainVerifier:
        if self._chain is None:
            self._chain = AuditChainVerifier(tenant, self._roots)
        return self._chain

    def report(self) -> AuditReport:
        """Return the report; raise ``file_invalid`` when the log had no head."""
        if self._chain is None or self._head is None:
            raise OctoError("The export lacks its last line, which has the end of the log.", code="file_invalid")
        self._chain.check_head(self._head)
        faults = list(self._chain.faults)
        if self._earlier is not None and not self._contains_earlier:
            is_archived = self._earlier.seq < self._unverified
            what = "ends in the archived rows: use --archive" if is_archived else "ends there with another row"
            faults.append(AuditChainError(self._earlier.seq, f"the earlier export {what}"))
        return AuditReport(self._head.tenant, self._chain.rows, self._head, tuple(faults), self._unverified)


def _print_report(report: AuditReport) -> None:
    console = output()
    for fault in report.faults:
        place = f"row {fault.seq}" if fault.seq else "the end"
        console.print(Text(f"✗ {place}: {fault.what}", "octo.bad"))
    if report.unverified:
        console.print(Text(f"The rows up to {report.unverified} are in the archive and were not read: use --archive."))
    rows = f"{report.rows} row{'' if report.rows == 1 else 's'} of {report.tenant}"
    if report.faults:
        console.print(Text(f"{rows}: not as they were sealed."))
    else:
        console.print(Text(f"✓ {rows}, as they were sealed. The chain stands at {report.head.hash or 'nothing'}."))


async def _fetch_lines(client: AsyncClient, *, system: bool) -> AsyncIterator[Line]:
    """Yield the cut, every row up to the head of the first page, and then that head: later rows are left out."""
    first = await client.admin.audit(limit=_PAGE, system=system)
    page, after = first, 0
    if first.cut is not None:
        yield AuditCut(first.cut)
        after = first.cut.seq
    while page.rows and after < first.head.seq:
        for row in page.rows:
            if row.seq <= first.head.seq:
                yield row
        after = page.rows[-1].seq
        if after < first.head.seq:
            page = await client.admin.audit(after=after, limit=_PAGE, system=system)
    yield AuditTrailer(first.head)


def _load_archive(url: str) -> ReadArchived:
    from octollm.services.orchestrator.archive import open_archive, read_archived_audit  # noqa: PLC0415

    return partial(read_archived_audit, open_archive(url))


def _read_export(file: Path) -> Iterator[Line]:
    with map_file_errors(file, "read", code="file_invalid"), file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield decode_audit_line(line, f"{file}, line {number},")


def _read_head(file: Path) -> AuditHead:
    head: AuditHead | None = None
    for line in _read_export(file):
        match line:
            case AuditTrailer(end) | AuditCut(end):
                head = end
            case AuditRow():
                head = AuditHead(line.tenant, line.seq, line.hash)
    if head is None:
        raise OctoError(f"{file} has no line.", code="file_invalid")
    return head
