"""`octollm audit verify` across the cut of an audit log whose oldest rows are in an archive."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from typer.testing import CliRunner

from octollm.capability import Principal, SigningKey
from octollm.cli.app import app
from octollm.clock import Uuid7Generator
from octollm.contracts.observability import AuditCut, AuditPage, AuditTrailer
from octollm.events import EventLog
from octollm.installation.keys import encode_public_keys
from octollm.services.orchestrator.archive import open_archive
from octollm.services.orchestrator.audit import Actor, AuditSealer, archive_audit, read_audit_page, record_audit
from octollm.storage import open_database
from octollm.storage.migrations import migrate
from octollm.testing import ManualClock


async def log_with_a_cut(folder: Path) -> AuditPage:
    """Write four rows, of which two are archived, an export before that, and the root key; return the log."""
    clock = ManualClock()
    root = SigningKey.generate("root")
    async with open_database("memory://", clock=clock) as db:
        await migrate(db, "orchestrator")
        sealer = AuditSealer(db, EventLog(db, clock, Uuid7Generator(clock)), root, clock)
        for _ in range(2):
            for _ in range(2):
                async with db.transaction() as tx:
                    await record_audit(tx, Actor(Principal("ada", "k", "t")), "task.created", "x", clock.now())
            await sealer.seal()
            clock.time += 100
            if not (folder / "earlier.jsonl").exists():
                export(folder / "earlier.jsonl", await read_audit_page(db, "t", 0, 10))
        await archive_audit(db, clock.now() - 150, open_archive(f"file://{folder}/archive").store)
        page = await read_audit_page(db, "t", 0, 10)
    (folder / "roots.jwks").write_bytes(encode_public_keys([(root.public, 0.0)]))
    (folder / "roots.jwks").chmod(0o600)
    export(folder / "log.jsonl", page)
    return page


def export(file: Path, page: AuditPage) -> None:
    lines = [*([AuditCut(page.cut)] if page.cut else []), *page.rows, AuditTrailer(page.head)]
    file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def verify(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["audit", "verify", *arguments, "--roots", str(folder / "roots.jwks")])


def test_the_archive_and_the_log_are_one_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = asyncio.run(log_with_a_cut(tmp_path))
    assert ([row.seq for row in page.rows], page.cut and page.cut.seq) == ([3, 4], 2)
    log, archive = str(tmp_path / "log.jsonl"), f"file://{tmp_path}/archive"
    whole = verify(tmp_path, log, "--archive", archive, "--json")
    assert whole.exit_code == 0, whole.output
    assert json.loads(whole.stdout)["rows"] == 4
    part = verify(tmp_path, log)
    assert part.exit_code == 0
    assert "rows up to 2 are in the archive and were not read" in " ".join(part.output.split())
    # An earlier export, which ends before the cut, is found in the archive, and only there.
    earlier = ("--against", str(tmp_path / "earlier.jsonl"))
    assert verify(tmp_path, log, *earlier, "--archive", archive).exit_code == 0
    monkeypatch.setenv("OCTOLLM_ARCHIVE_URL", archive)
    assert verify(tmp_path, log, *earlier).exit_code == 0
    # An object is an export by itself, and who changes or removes it is found out.
    [name] = (tmp_path / "archive/audit/t").iterdir()
    assert verify(tmp_path, str(name)).exit_code == 0
    name.write_text(name.read_text().replace('"ada"', '"mallory"'))
    changed = verify(tmp_path, log)
    assert (changed.exit_code, "row 1: it was changed" in changed.output) == (1, True), changed.output
    name.unlink()
    gone = verify(tmp_path, log)
    assert (gone.exit_code, "rows 1 to 2 are not in the archive" in gone.output) == (1, True), gone.output
