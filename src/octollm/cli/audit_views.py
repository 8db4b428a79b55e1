"""`octollm audit export` and `octollm audit verify`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import msgspec
from rich.text import Text

from octollm.capability import PublicKey
from octollm.capability.audit_chain import AuditFault, ChainCheck
from octollm.cli.door import open_client
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE, EXIT_FAILED
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.client import Client
from octollm.contracts.audit import AuditHead, AuditRow
from octollm.errors import OctoError
from octollm.installation.roots import known_roots

_PAGE = 500


class _Last(msgspec.Struct, frozen=True):
    """The last line of an export."""

    head: AuditHead


class Verdict(msgspec.Struct, frozen=True):
    """What a check found."""

    tenant: str
    rows: int
    head: AuditHead
    faults: tuple[AuditFault, ...]


def export_command(*, system: bool) -> int:
    """Print every row and the head."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            async for line in _asked(octo, system=system):
                print(msgspec.json.encode(_Last(line) if isinstance(line, AuditHead) else line).decode())
        return EXIT_DONE

    return run_command(work)


def verify_command(file: Path | None, *, roots: Path | None, against: Path | None, system: bool, as_json: bool) -> int:
    """Check an export, or what the installation answers."""

    async def work() -> int:
        settings = command_settings()
        reading = _Reading(known_roots(settings, roots), None if against is None else _head_of(against))
        if file is not None:
            for line in _read(file):
                reading.take(line)
        else:
            async with open_client(settings) as octo:
                async for line in _asked(octo, system=system):
                    reading.take(line)
        verdict = reading.verdict()
        if as_json:
            print(msgspec.json.encode(verdict).decode())
        else:
            _show(verdict)
        return EXIT_FAILED if verdict.faults else EXIT_DONE

    return run_command(work)


class _Reading:
    """The check of one log while its lines are read; ``earlier`` is where an earlier export of it ended."""

    def __init__(self, roots: Mapping[str, PublicKey], earlier: AuditHead | None) -> None:
        self._roots = roots
        self._earlier = earlier
        self._there = earlier is None or earlier.seq == 0
        self._check: ChainCheck | None = None
        self._head: AuditHead | None = None

    def take(self, line: AuditRow | AuditHead) -> None:
        """Check a line."""
        if self._check is None:
            self._check = ChainCheck(line.tenant, self._roots)
        if isinstance(line, AuditHead):
            self._head = line
            return
        self._check.take(line)
        if self._earlier is not None and line.seq == self._earlier.seq:
            self._there = line.hash == self._earlier.hash

    def verdict(self) -> Verdict:
        """Return what was found; raise ``file_invalid`` when there was no whole log."""
        if self._check is None or self._head is None:
            raise OctoError("The export has no last line that says where the log ends.", code="file_invalid")
        self._check.end(self._head)
        faults = list(self._check.faults)
        if self._earlier is not None and not self._there:
            faults.append(AuditFault(self._earlier.seq, "the earlier export ends there with another row"))
        return Verdict(self._head.tenant, self._check.rows, self._head, tuple(faults))


def _show(verdict: Verdict) -> None:
    console = output()
    for fault in verdict.faults:
        place = f"row {fault.seq}" if fault.seq else "the end"
        console.print(Text(f"✗ {place}: {fault.what}", "octo.bad"))
    rows = f"{verdict.rows} row{'' if verdict.rows == 1 else 's'} of {verdict.tenant}"
    if verdict.faults:
        console.print(Text(f"{rows}: not as they were sealed."))
    else:
        console.print(Text(f"✓ {rows}, as they were sealed. The chain stands at {verdict.head.hash or 'nothing'}."))


async def _asked(octo: Client, *, system: bool) -> AsyncIterator[AuditRow | AuditHead]:
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


def _read(file: Path) -> Iterator[AuditRow | AuditHead]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield (
                        msgspec.json.decode(line, type=_Last).head
                        if line.startswith(b'{"head"')
                        else (msgspec.json.decode(line, type=AuditRow))
                    )
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise OctoError(f"{file}, line {number}, is no audit row: {error}", code="file_invalid") from error
    except OSError as error:
        raise OctoError(f"{file} cannot be read: {error.strerror}.", code="file_invalid") from error


def _head_of(file: Path) -> AuditHead:
    head: AuditHead | None = None
    for line in _read(file):
        head = line if isinstance(line, AuditHead) else AuditHead(line.tenant, line.seq, line.hash)
    if head is None:
        raise OctoError(f"{file} has no line.", code="file_invalid")
    return head
