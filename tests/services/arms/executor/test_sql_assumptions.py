"""A file that leaves a choice, from its bytes to the result of a query in the sandbox."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from octollm.contracts.operations import RunResult
from octollm.services.arms.coder.data import answer_data
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.runner import DESCRIBE, build_sql_job
from octollm.services.arms.executor.sandbox import MIB, Limits, SandboxResult

LIMITS = Limits(wall_seconds=30, cpu_seconds=60, memory_bytes=1024 * MIB)
BANK = """"Umsätze";"Konto DE12 3456"
"Zeitraum:";"01.01.2024 - 31.01.2024"

Buchungstag;Empfänger;Verwendungszweck;Betrag;Währung;
02.01.2024;REWE;Einkauf, Lebensmittel;-45,67;EUR;
03.01.2024;Arbeitgeber GmbH;Gehalt;2.500,00;EUR;
15.01.2024;"Müller; Hans";Miete;-850,00;EUR;
Summe;;;1.604,33;EUR;

Kontostand am 31.01.2024;;;3.000,00;EUR
"""

pytestmark = pytest.mark.sandbox


async def run(sandbox: Bubblewrap, query: str, **files: str | bytes) -> SandboxResult:
    named = {name.replace("__", "."): data.encode() if isinstance(data, str) else data for name, data in files.items()}
    return await sandbox.run(build_sql_job(query, named, LIMITS))


async def answer(sandbox: Bubblewrap, query: str, **files: str | bytes) -> dict[str, Any]:
    outcome = await run(sandbox, query, **files)
    assert outcome.stderr == ""
    return json.loads(outcome.stdout)


async def test_a_bank_export(bubblewrap: Bubblewrap) -> None:
    found = await answer(
        bubblewrap,
        "SELECT count(*), sum(Betrag)::DECIMAL(9, 2), max(Buchungstag) FROM data",
        bank__csv=BANK.encode("cp1252"),
    )
    assert found["rows"] == [[3, 1604.33, "2024-01-15"]]
    texts = [each["text"] for each in found["assumptions"]]
    assert "The row 'Summe 1.604,33 EUR' is a total and left out." in texts
    assert any("Kontostand" in text for text in texts)
    assert all(each["decided"] for each in found["assumptions"])


async def test_thousands_that_nothing_decides(bubblewrap: Bubblewrap) -> None:
    found = await answer(bubblewrap, "SELECT sum(amount) AS s FROM data", a__csv="name;amount\na;1.234\nb;2.500\n")
    assert found["rows"] == [[3734]]
    (assumption,) = found["assumptions"]
    assert (assumption["column"], assumption["decided"]) == ("amount", False)
    assert "'1.234' can be 1.234 or 1,234; read as 1,234" in assumption["text"]


async def test_thousands_that_another_column_decides(bubblewrap: Bubblewrap) -> None:
    text = "name;amount;fee\na;1.234;0,50\nb;2.500;1,25\n"
    found = await answer(bubblewrap, "SELECT sum(amount) AS s FROM data", a__csv=text)
    assert found["rows"] == [[3734]]
    (assumption,) = found["assumptions"]
    assert assumption["text"] == "amount: read 1.234 as 1,234 (decimal comma elsewhere in the file)"
    assert assumption["decided"]


@pytest.mark.parametrize(
    ("query", "columns"),
    [
        ("SELECT count(*) FROM a", []),
        ("SELECT count(*), sum(x) FROM a", ["x"]),
        ("SELECT * FROM a", ["x", "y"]),
        ("FROM a", ["x", "y"]),
        ('SELECT "x" + y FROM a', ["x", "y"]),
        ("SELECT sum(z) FROM b", ["z"]),
        ("SELECT sum(x), sum(z) FROM a JOIN b USING (id)", ["x", "z"]),
    ],
)
async def test_the_assumptions_are_those_of_the_query(bubblewrap: Bubblewrap, query: str, columns: list[str]) -> None:
    found = await answer(bubblewrap, query, a__csv="id;x;y\n1;1.234;1.234\n", b__csv="id;z\n1;1.234\n")
    assert [each["column"] for each in found["assumptions"]] == columns


async def test_a_description_has_types_and_assumptions(bubblewrap: Bubblewrap) -> None:
    found = await answer(bubblewrap, DESCRIBE, a__csv="zip;day;amount\n01067;1. März 2024;12,50 €\n")
    (table,) = found["tables"]
    assert [column["type"] for column in table["columns"]] == ["VARCHAR", "DATE", "DOUBLE"]
    assert [(each["table"], each["column"]) for each in found["assumptions"]] == [("a", "zip"), ("a", "amount")]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 10, "it is no text: there is a control character at offset"),
        (b'a,b\n1,"x\n' + b"2,3\n" * 500, "the quotation mark that opens a cell in line 2 is never closed"),
        (b"a,b\n1,2,3\n4,5,6\n7,8,9\n", "line 1, the header, has 2 cells, but most lines after it have 3"),
    ],
)
async def test_a_file_that_is_no_table_says_why_and_where(bubblewrap: Bubblewrap, data: bytes, reason: str) -> None:
    outcome = await run(bubblewrap, "FROM data", a__csv=data)
    assert outcome.exit_code == 1
    assert f"a.csv could not be loaded: {reason}" in outcome.stderr


async def test_a_table_of_more_than_the_usual_file_size(bubblewrap: Bubblewrap) -> None:
    rows = "".join(f"{n % 28 + 1:02}.01.2024;Kunde {n};{n % 1000},5\n" for n in range(650_000))
    assert len(rows) > 17 * MIB
    limits = Limits(wall_seconds=30, cpu_seconds=60, memory_bytes=1024 * MIB, file_bytes=MIB)
    job = build_sql_job(
        "SELECT count(Tag), sum(Betrag) FROM data", {"a.csv": b"Tag;Wer;Betrag\n" + rows.encode()}, limits
    )
    found = json.loads((await bubblewrap.run(job)).stdout)
    assert found["rows"] == [[650_000, sum(n % 1000 + 0.5 for n in range(650_000))]]


async def test_the_answer_that_the_documentation_shows(bubblewrap: Bubblewrap) -> None:
    page = Path(__file__).parents[4] / "docs" / "files.md"
    shown = re.search(
        r"<!-- test: table answer -->\n```text\n\$ cat (\S+)\n(.*?)\$ octollm run \"(.*?)\".*?\nResult\n(.*?)```",
        page.read_text("utf-8"),
        re.DOTALL,
    )
    assert shown is not None
    file, content, question, text = shown.groups()

    async def run_sql(query: str) -> RunResult:
        job = build_sql_job(DESCRIBE if query == "--describe" else query, {file: content.encode()}, LIMITS)
        outcome = await bubblewrap.run(job)
        return RunResult(outcome.exit_code, outcome.stdout, outcome.stderr)

    async def ask(*_messages: object, **_options: object) -> str:
        raise AssertionError("a rule answers it")

    result = await answer_data(question, ask, run_sql)
    assert result.output.replace("```sql\n", "").replace("\n```", "") == text.strip()


async def test_a_line_that_is_too_long_is_refused(bubblewrap: Bubblewrap) -> None:
    outcome = await run(bubblewrap, DESCRIBE, a__csv="a" * 9_000_000 + "\n")
    assert "Traceback" not in outcome.stderr
    assert "a line cannot be split into cells" in outcome.stderr + outcome.stdout
