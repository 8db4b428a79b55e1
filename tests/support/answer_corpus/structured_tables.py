"""Workbooks, JSON and Parquet: values that the file types itself, and numbers that it has as texts."""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import document_files as made
import duckdb
import openpyxl
from table_corpus import grouped, write

from answer_corpus import questions as ask
from answer_corpus.model import Case, Question, Table, scalar
from answer_corpus.text_tables import one

CITIES = ("Hamburg", "Wien", "Zürich", "Graz")


def orders(rng: random.Random, n: int) -> Table:
    start = date(2024, 2, 1)
    rows = [
        (
            1000 + i,
            rng.randint(1, 8),
            start + timedelta(days=rng.randint(0, 120)),
            rng.randint(500, 99_999) / 100,
            rng.choice(("paid", "open", "cancelled")),
        )
        for i in range(n)
    ]
    return Table(("order_id", "customer_id", "order_date", "amount", "status"), rows)


def customers(rng: random.Random) -> Table:
    names = ("Adler", "Berg", "Conrad", "Duda", "Egger", "Fuchs", "Gruber", "Huber")
    return Table(
        ("customer_id", "customer_name", "city"), [(i, name, rng.choice(CITIES)) for i, name in enumerate(names, 1)]
    )


def with_header(table: Table) -> list[tuple[Any, ...]]:
    return [table.names, *table.rows]


def as_text(table: Table) -> bytes:
    return write([table.names, *[["" if cell is None else str(cell) for cell in row] for row in table.rows]], ",")


def as_json(table: Table) -> list[dict[str, Any]]:
    return [
        {
            name: cell.isoformat() if isinstance(cell, date) else cell
            for name, cell in zip(table.names, row, strict=True)
        }
        for row in table.rows
    ]


def as_parquet(table: Table, types: Sequence[str]) -> bytes:
    columns = ", ".join(f'"{name}" {kind}' for name, kind in zip(table.names, types, strict=True))
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        path = Path(folder, "t.parquet")
        connection.execute(f"CREATE TABLE t ({columns})")
        connection.executemany(
            f"INSERT INTO t VALUES ({', '.join('?' * len(types))})", [list(row) for row in table.rows]
        )
        connection.execute(f"COPY t TO '{path}' (FORMAT parquet)")
        return path.read_bytes()


def book(case: str, name: str, data: bytes, tables: dict[str, Table], *asked: Question | None, note: str = "") -> Case:
    return Case(
        case,
        "workbook",
        {name: data},
        tables,
        questions=tuple(each for each in asked if each),
        note=note,
        is_plain=False,
    )


def workbooks() -> list[Case]:
    rng = random.Random("workbooks")
    table = orders(rng, 40)
    cases = [
        book(
            "xlsx-plain",
            "orders.xlsx",
            made.workbook({"Orders": with_header(table)}),
            {"orders": table},
            ask.sum_of(table, "amount"),
            ask.count_where(table, "status", "open"),
            ask.sum_in_month(table, "amount", "order_date"),
        ),
    ]
    table = orders(rng, 25)
    titled = [
        ["Order report"],
        ["Created by the shop"],
        [],
        *with_header(table),
        ["Total", None, None, ask.total(table.column("amount")), None],
    ]
    cases.append(
        book(
            "xlsx-titled",
            "order report.xlsx",
            made.workbook({"Report": titled}),
            {"order_report": table},
            ask.sum_of(table, "amount"),
            ask.how_many_rows(table),
            ask.sum_per(table, "amount", "status"),
        )
    )
    stock = Table(
        ("article", "count", "price"),
        [(f"A{i:03}", rng.randint(0, 90), rng.randint(100, 9900) / 100) for i in range(1, 21)],
    )
    costs = Table(("article", "cost"), [(f"A{i:03}", rng.randint(50, 5000) / 100) for i in range(1, 21)])
    cases.append(
        book(
            "xlsx-hidden",
            "shop.xlsx",
            made.workbook({"Stock": with_header(stock), "Costs": with_header(costs)}, hidden=["Costs"]),
            {"shop_stock": stock, "shop_costs": costs},
            ask.sum_of(costs, "cost"),
            ask.label_of_highest(stock, "article", "price"),
            note="hidden",
        )
    )
    rows = [(f"Filiale {i}", rng.randint(1000, 999_999) / 100) for i in range(1, 16)]
    texts = [[name, grouped(value, ",", ".")] for name, value in rows]
    shifted = [
        [None, None, None],
        [None, "Umsätze 2024"],
        [],
        *[[None, None, *row] for row in [["Filiale", "Umsatz"], *texts]],
    ]
    table = Table(("Filiale", "Umsatz"), rows)
    cases.append(
        book(
            "xlsx-shifted-text-numbers",
            "filialen.xlsx",
            made.workbook({"Tabelle1": shifted}),
            {"filialen": table},
            scalar("Wie hoch ist der Umsatz insgesamt?", ask.total(table.column("Umsatz"))),
            ask.label_of_highest(table, "Filiale", "Umsatz"),
        )
    )
    cases.append(
        book(
            "xlsx-named-csv",
            "filialen_2.csv",
            made.workbook({"Tabelle1": [table.names, *rows]}),
            {"filialen_2": table},
            scalar("What is the sum of Umsatz?", ask.total(table.column("Umsatz"))),
            note="named as CSV",
        )
    )
    old = Table(
        ("name", "since", "points"),
        [(f"Team {i}", date(2020, 1, 1) + timedelta(days=37 * i), rng.randint(1, 99)) for i in range(1, 18)],
    )
    cases.append(
        book(
            "xls",
            "teams.xls",
            made.old_workbook(with_header(old), "Teams"),
            {"teams": old},
            ask.earliest(old, "since"),
            ask.label_of_highest(old, "name", "points"),
        )
    )
    table = Table(("part", "weight"), [(f"P{i}", round(rng.uniform(0.1, 9.9), 2)) for i in range(1, 22)])
    cases.append(
        book(
            "ods",
            "parts.ods",
            made.open_document(with_header(table), "Parts"),
            {"parts": table},
            ask.sum_of(table, "weight"),
            ask.label_of_highest(table, "part", "weight"),
        )
    )
    groups = [["Region", "2023", None, "2024", None], [None, "Units", "Revenue", "Units", "Revenue"]]
    names = ("Region", "2023 Units", "2023 Revenue", "2024 Units", "2024 Revenue")
    rows = [
        (name, rng.randint(1, 90), rng.randint(100, 9999), rng.randint(1, 90), rng.randint(100, 9999))
        for name in ("North", "South", "East", "West")
    ]
    table = Table(names, rows)
    cases.append(
        book(
            "xlsx-two-headers",
            "regions.xlsx",
            made.workbook({"R": [*groups, *rows]}),
            {"regions": table},
            ask.sum_of(table, "2024 Revenue"),
            ask.label_of_highest(table, "Region", "2023 Units"),
        )
    )
    stamp = Table(
        ("id", "at", "done"),
        [(i, datetime(2025, 1, 6, 8, 0) + timedelta(minutes=47 * i), i % 3 != 0) for i in range(1, 31)],
    )
    cases.append(
        book(
            "xlsx-times",
            "jobs.xlsx",
            made.workbook({"Jobs": with_header(stamp)}),
            {"jobs": stamp},
            ask.latest(stamp, "at"),
            scalar("How many jobs are done?", sum(r[2] for r in stamp.rows)),
        )
    )
    table = Table(("month", "share"), [(f"2024-{i:02}", round(rng.uniform(0.01, 0.6), 3)) for i in range(1, 13)])
    cases.append(
        book(
            "xlsx-share",
            "share.xlsx",
            made.workbook({"S": with_header(table)}),
            {"share": table},
            ask.highest(table, "share"),
        )
    )
    empty = Table(("a", "b"), [])
    cases.append(
        book(
            "xlsx-header-only",
            "empty.xlsx",
            made.workbook({"S": [["a", "b"]]}),
            {"empty": empty},
            scalar("How many rows are there?", 0),
        )
    )
    cases.append(wide_book(rng))
    return cases


def wide_book(rng: random.Random) -> Case:
    """Return a workbook of a ledger with a sheet for each quarter, and zip codes stored as text."""
    sheets: dict[str, list[Any]] = {}
    tables: dict[str, Table] = {}
    for quarter in ("Q1", "Q2"):
        rows = [
            (f"{rng.randint(1000, 9999):05}", rng.choice(("rent", "power", "phone")), rng.randint(1000, 99_999) / 100)
            for _ in range(12)
        ]
        table = Table(("zip", "purpose", "cost"), rows)
        sheets[quarter] = with_header(table)
        tables[f"ledger_{quarter.lower()}"] = table
    both = ask.total([*tables["ledger_q1"].column("cost"), *tables["ledger_q2"].column("cost")])
    return book(
        "xlsx-two-sheets",
        "ledger.xlsx",
        made.workbook(sheets),
        tables,
        scalar("What is the sum of cost of Q1 and Q2 together?", both),
        scalar("What is the sum of cost in Q2?", ask.total(tables["ledger_q2"].column("cost"))),
    )


def records() -> list[Case]:
    rng = random.Random("records")
    table = orders(rng, 30)
    found = [
        one(
            "json-records",
            "orders.json",
            json.dumps(as_json(table)).encode(),
            table,
            ask.sum_of(table, "amount"),
            ask.count_where(table, "status", "paid"),
            kind="json",
        )
    ]
    table = orders(rng, 24)
    found.append(
        one(
            "json-wrapped",
            "export.json",
            json.dumps({"count": 24, "data": as_json(table)}).encode(),
            table,
            ask.sum_of(table, "amount"),
            ask.how_many_rows(table),
            kind="json",
        )
    )
    table = Table(
        ("name", "price", "since"),
        [(f"item {i}", rng.randint(1000, 99_999) / 100, date(2024, 1, 1) + timedelta(days=i)) for i in range(1, 25)],
    )
    strings = [{"name": n, "price": f"{p:.2f}", "since": s.isoformat()} for n, p, s in table.rows]
    found.append(
        one(
            "json-numbers-as-strings",
            "items.json",
            json.dumps(strings).encode(),
            table,
            ask.sum_of(table, "price"),
            ask.label_of_highest(table, "name", "price"),
            kind="json",
        )
    )
    german = Table(
        ("Artikel", "Preis", "Menge"),
        [(f"Artikel {i}", rng.randint(100_000, 999_999) / 100, rng.randint(1, 50)) for i in range(1, 19)],
    )
    strings = [{"Artikel": n, "Preis": grouped(p, ",", ".") + " €", "Menge": str(m)} for n, p, m in german.rows]
    found.append(
        one(
            "json-german-strings",
            "artikel.json",
            json.dumps(strings, ensure_ascii=False).encode(),
            german,
            ask.sum_of(german, "Preis"),
            ask.sum_of(german, "Menge"),
            kind="json",
        )
    )
    table = Table(
        ("user", "age", "email"),
        [(f"u{i}", rng.randint(18, 80), None if i % 4 else f"u{i}@example.org") for i in range(1, 31)],
    )
    lines = "\n".join(json.dumps({k: v for k, v in row.items() if v is not None}) for row in as_json(table))
    found.append(
        one(
            "jsonl-missing",
            "users.jsonl",
            lines.encode(),
            table,
            ask.average_of(table, "age"),
            ask.count_above(table, "age", 40),
            kind="json",
        )
    )
    table = Table(
        ("zip", "id", "ok"), [(f"0{rng.randint(1000, 9999)}", str(10**17 + i), i % 2 == 0) for i in range(1, 16)]
    )
    found.append(
        one(
            "jsonl-identifiers",
            "codes.ndjson",
            "\n".join(map(json.dumps, as_json(table))).encode(),
            table,
            scalar("How many rows have ok = true?", sum(r[2] for r in table.rows)),
            kind="json",
        )
    )
    return found


def parquet() -> list[Case]:
    rng = random.Random("parquet")
    table = orders(rng, 50)
    first = Case(
        "parquet-typed",
        "parquet",
        {"orders.parquet": as_parquet(table, ("INT", "INT", "DATE", "DECIMAL(10,2)", "VARCHAR"))},
        {"orders": table},
        questions=(ask.sum_of(table, "amount"), ask.count_per(table, "status")),
        is_plain=False,
    )
    table = Table(("city", "value"), [(rng.choice(CITIES), rng.randint(100, 9_999_999) / 100) for _ in range(30)])
    texts = Table(table.names, [(city, grouped(value, ",", ".")) for city, value in table.rows])
    second = Case(
        "parquet-text-numbers",
        "parquet",
        {"values.parquet": as_parquet(texts, ("VARCHAR", "VARCHAR"))},
        {"values": table},
        questions=(ask.sum_of(table, "value"), ask.sum_per(table, "value", "city")),
        is_plain=False,
    )
    return [first, second]


def formulas() -> Case:
    """Return a workbook whose sums are formulas with their stored results, as a spreadsheet program saves it."""
    import xlsxwriter  # noqa: PLC0415  a library of the tests

    rng = random.Random("formulas")
    rows = [(f"Job {i}", rng.randint(1, 9), rng.randint(20, 90)) for i in range(1, 14)]
    out = io.BytesIO()
    with xlsxwriter.Workbook(out) as workbook:
        sheet = workbook.add_worksheet("Jobs")
        sheet.write_row(0, 0, ("job", "hours", "rate", "pay"))
        for number, (name, hours, rate) in enumerate(rows, 1):
            sheet.write_row(number, 0, (name, hours, rate))
            sheet.write_formula(number, 3, f"=B{number + 1}*C{number + 1}", None, hours * rate)
    table = Table(("job", "hours", "rate", "pay"), [(n, h, r, h * r) for n, h, r in rows])
    return book(
        "xlsx-formulas",
        "pay.xlsx",
        out.getvalue(),
        {"pay": table},
        ask.sum_of(table, "pay"),
        ask.label_of_highest(table, "job", "pay"),
    )


def merged_cells() -> Case:
    rng = random.Random("merged")
    workbook = openpyxl.Workbook()
    sheet: Any = workbook.active
    rows = [(name, rng.randint(1, 90), rng.randint(1, 90)) for name in ("Ann", "Bob", "Cid", "Dan", "Eve")]
    sheet.append(["Attendance 2024"])
    sheet.merge_cells("A1:C1")
    for row in (("person", "days", "hours"), *rows):
        sheet.append(row)
    out = io.BytesIO()
    workbook.save(out)
    table = Table(("person", "days", "hours"), rows)
    return book(
        "xlsx-merged-title",
        "attendance.xlsx",
        out.getvalue(),
        {"attendance": table},
        ask.sum_of(table, "days"),
        ask.label_of_highest(table, "person", "hours"),
    )


def build() -> list[Case]:
    return [*workbooks(), formulas(), merged_cells(), *records(), *parquet()]
