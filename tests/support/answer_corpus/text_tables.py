"""Tables in text: statements of banks and shops, and the forms that exports take."""

from __future__ import annotations

import random
from datetime import date, datetime, timedelta
from typing import Any

import table_corpus
from table_corpus import grouped, write

from answer_corpus import questions as ask
from answer_corpus.model import Case, Question, Table, scalar, table_name

OLD_KINDS = (
    "bank_de",
    "bank_fr",
    "bank_ch",
    "bank_uk",
    "bank_in",
    "bank_us",
    "invoice",
    "sensor",
    "staff",
    "no_header",
    "subtotals",
    "mixed",
    "header_only",
    "uneven",
    "decided_by_file",
)
NUMBER_COLUMNS = {
    "bank_de": "Betrag",
    "bank_fr": "Débit",
    "bank_ch": "Betrag CHF",
    "bank_uk": "Amount",
    "bank_in": "Amount",
    "bank_us": "Amount",
    "invoice": "Gesamt",
    "sensor": "temperature",
    "staff": "Gehalt",
    "no_header": "column_3",
    "subtotals": "Revenue",
    "uneven": "amount",
    "decided_by_file": "fee",
}


def statement(kind: str) -> Case:
    """Return an export of the kinds of ``table_corpus``, from a seed that its tests do not have."""
    rng = random.Random(f"answers {kind}")
    sample = table_corpus.KINDS[kind](rng)
    name = f"{kind}.csv"
    table = Table(sample.names, sample.rows)
    number = NUMBER_COLUMNS.get(kind)
    asked: tuple[Question, ...] = (ask.how_many_rows(table),)
    if number:
        label = table.names[1]
        asked = ask.choose(
            rng,
            2,
            ask.sum_of(table, number),
            ask.average_of(table, number),
            ask.highest(table, number),
            ask.lowest(table, number),
            ask.how_many_rows(table),
            ask.count_above(table, number, 100),
            ask.label_of_highest(table, label, number) if isinstance(table.rows[0][1], str) else None,
        )
    return Case(f"statement-{kind}", "csv", {name: sample.data}, {table_name(name): table}, questions=asked)


def one(identity: str, name: str, data: bytes, table: Table, *asked: Question | None, kind: str = "csv") -> Case:
    return Case(
        identity, kind, {name: data}, {table_name(name): table}, questions=tuple(each for each in asked if each)
    )


def years_as_columns() -> Case:
    rng = random.Random("years")
    head = ("Country", "2021", "2022", "2023")
    rows = [
        (name, *(rng.randint(100, 90_000) for _ in range(3))) for name in ("Norway", "Chile", "Japan", "Kenya", "Peru")
    ]
    table = Table(head, rows)
    return one(
        "years",
        "population.csv",
        write([head, *[[str(c) for c in row] for row in rows]], ","),
        table,
        ask.sum_of(table, "2022"),
        ask.label_of_highest(table, "Country", "2023"),
    )


def many_lines() -> Case:
    rng = random.Random("lines")
    rows = [
        (i, f'Dear team,\nnumber {i}; "quoted", with a comma', rng.choice(("open", "closed")), rng.randint(1, 9))
        for i in range(1, 31)
    ]
    head = ("ticket", "message", "state", "hours")
    table = Table(head, rows)
    return one(
        "many-lines",
        "tickets.csv",
        write([head, *[[str(c) for c in row] for row in rows]], ","),
        table,
        ask.count_where(table, "state", "open"),
        ask.sum_where(table, "hours", "state", "closed"),
    )


def carriage_returns() -> Case:
    rng = random.Random("cr")
    rows = [(f"Room {i}", rng.randint(10, 90)) for i in range(1, 13)]
    data = "\r".join(["room;seats", *(f"{name};{seats}" for name, seats in rows)]).encode()
    table = Table(("room", "seats"), rows)
    return one("cr-only", "rooms.csv", data, table, ask.sum_of(table, "seats"), ask.count_above(table, "seats", 40))


def wide_characters() -> Case:
    rng = random.Random("utf32")
    rows = [(f"Läufer {i}", round(rng.uniform(9.5, 14.9), 2)) for i in range(1, 21)]
    table = Table(("Name", "Zeit"), rows)
    data = write(
        [table.names, *[[name, f"{value:.2f}".replace(".", ",")] for name, value in rows]], ";", encoding="utf-32"
    )
    return one(
        "utf-32",
        "lauf.csv",
        data,
        table,
        scalar("Was ist die niedrigste Zeit?", min(table.column("Zeit"))),
        ask.average_of(table, "Zeit"),
    )


def accounts() -> Case:
    rng = random.Random("accounts")
    rows = [
        (f"{rng.randint(1000, 9999)}", f"Account {i}", round(rng.uniform(-90_000, 90_000), 2)) for i in range(1, 26)
    ]
    rows = [(f"0{number[1:]}", *rest) for number, *rest in rows]
    head = ("Number", "Account", "Balance")
    table = Table(head, rows)
    body = [
        [number, name, f"({grouped(abs(v), '.', ',')})" if v < 0 else grouped(v, ".", ",")] for number, name, v in rows
    ]
    return one(
        "accounts",
        "trial balance.csv",
        write([["Trial balance"], ["as of 31 December 2024"], [], head, *body], ","),
        table,
        ask.sum_of(table, "Balance"),
        scalar("How many accounts have a negative balance?", sum(v < 0 for *_, v in rows)),
        ask.label_of_highest(table, "Account", "Balance"),
    )


def stock() -> Case:
    rng = random.Random("stock")
    head = ("SKU", "Item", "In stock", "Reorder", "Price")
    rows = [
        (
            f"{rng.randint(1, 99999):07}",
            f"Part {i}",
            rng.randint(0, 60),
            rng.random() < 0.4,
            rng.randint(100, 9999) / 100,
        )
        for i in range(1, 36)
    ]
    rows[0], rows[1] = (*rows[0][:3], True, rows[0][4]), (*rows[1][:3], False, rows[1][4])
    table = Table(head, rows)
    body = [
        [sku, item, str(count), "yes" if reorder else "no", f"${price:.2f}"]
        for sku, item, count, reorder, price in rows
    ]
    return one(
        "stock",
        "stock.csv",
        write([head, *body], ","),
        table,
        scalar("How many items have Reorder = yes?", sum(each[3] for each in rows)),
        scalar(
            "What is the total value of all items in stock (In stock times Price)?",
            round(sum(r[2] * r[4] for r in rows), 2),
        ),
        ask.count_above(table, "In stock", 30),
    )


def survey() -> Case:
    rng = random.Random("survey")
    head = ("Respondent", "Agree", "Age")
    rows = [(f"R{i:03}", rng.choice((None, rng.randint(0, 100))), rng.randint(18, 80)) for i in range(1, 41)]
    table = Table(head, rows)
    body = [[name, "n/a" if share is None else f"{share} %", str(age)] for name, share, age in rows]
    return one(
        "survey",
        "survey.csv",
        write([head, *body], ";"),
        table,
        ask.average_of(table, "Agree"),
        ask.highest(table, "Age"),
        ask.count_above(table, "Age", 65),
    )


def weather() -> Case:
    rng = random.Random("weather")
    start = date(2024, 11, 1)
    head = ("Datum", "Station", "Minimum", "Maximum")
    rows: list[tuple[Any, ...]] = []
    for i in range(40):
        low = round(rng.uniform(-18, 6), 1)
        rows.append((start + timedelta(days=i // 2), ("Oslo", "Bergen")[i % 2], low, round(low + rng.uniform(1, 9), 1)))
    table = Table(head, rows)
    body = [
        [
            f"{d:%d.%m.%Y}",
            s,
            f"{a:.1f}".replace("-", "−").replace(".", ","),
            f"{b:.1f}".replace("-", "−").replace(".", ","),
        ]
        for d, s, a, b in rows
    ]
    return one(
        "weather",
        "wetter.tsv",
        write([head, ["", "", "°C", "°C"], *body], "\t"),
        table,
        ask.lowest(table, "Minimum"),
        ask.sum_per(table, "Maximum", "Station"),
        scalar("Wie hoch war das höchste Maximum in Bergen?", max(r[3] for r in rows if r[1] == "Bergen")),
        kind="tsv",
    )


def log_times() -> Case:
    rng = random.Random("log")
    start = datetime(2025, 3, 3, 8, 0)
    head = ("time", "level", "service", "ms")
    rows = [
        (
            start + timedelta(seconds=37 * i),
            rng.choice(("INFO", "WARN", "ERROR")),
            rng.choice(("api", "db")),
            rng.randint(1, 900),
        )
        for i in range(80)
    ]
    table = Table(head, rows)
    body = [[f"{t:%Y-%m-%dT%H:%M:%S}+02:00", level, service, str(ms)] for t, level, service, ms in rows]
    return one(
        "log",
        "requests.tsv",
        write([head, *body], "\t"),
        table,
        ask.count_where(table, "level", "ERROR"),
        ask.count_per(table, "service"),
        ask.average_of(table, "ms"),
        kind="tsv",
    )


def inches() -> Case:
    rng = random.Random("inches")
    rows = [(f'{size}" pipe', rng.randint(2, 90), rng.randint(100, 9900) / 100) for size in range(1, 15)]
    table = Table(("product", "count", "price"), rows)
    data = "\r\n".join(
        ["product\tcount\tprice", *(f"{name}\t{count}\t{price:.2f}" for name, count, price in rows)]
    ).encode()
    return one(
        "inches",
        "pipes.tsv",
        data,
        table,
        ask.label_of_highest(table, "product", "price"),
        ask.sum_of(table, "count"),
        kind="tsv",
    )


def separator_line() -> Case:
    rng = random.Random("sep")
    rows = [(f"Kunde {i}", rng.randint(1, 99999) / 100) for i in range(1, 16)]
    table = Table(("Kunde", "Umsatz"), rows)
    data = b"sep=;\r\n" + write([table.names, *[[name, grouped(v, ",", ".")] for name, v in rows]], ";")
    return one(
        "sep-line",
        "umsatz.csv",
        data,
        table,
        scalar("Wie hoch ist der Umsatz insgesamt?", ask.total(table.column("Umsatz"))),
        ask.label_of_highest(table, "Kunde", "Umsatz"),
    )


def table_in_txt() -> Case:
    rng = random.Random("txt")
    rows = [(f"{i:04}", rng.choice(("Lyon", "Paris", "Nice")), rng.randint(5, 500)) for i in range(1, 41)]
    table = Table(("client", "ville", "points"), rows)
    return one(
        "rows-in-txt",
        "clients.tab",
        write([table.names, *[[a, b, str(c)] for a, b, c in rows]], "\t"),
        table,
        ask.sum_per(table, "points", "ville"),
        ask.count_where(table, "ville", "Paris"),
        kind="tsv",
    )


def footer_notes() -> Case:
    rng = random.Random("footer")
    rows = [(f"Station {chr(65 + i)}", rng.randint(100, 9000), round(rng.uniform(1, 9), 1)) for i in range(12)]
    head = ("Station", "Visitors", "Rating")
    table = Table(head, rows)
    lines = [
        ["Visitors by station, 2024"],
        ["Source: city council"],
        [],
        head,
        *[[n, f"{v:,}", f"{r:.1f}"] for n, v, r in rows],
        [],
        ["Total", f"{sum(table.column('Visitors')):,}", ""],
        [],
        ["* preliminary figures"],
    ]
    return one(
        "footer",
        "visitors.csv",
        write(lines, ","),
        table,
        ask.sum_of(table, "Visitors"),
        ask.how_many_rows(table),
        ask.label_of_highest(table, "Station", "Rating"),
    )


def duplicate_names() -> Case:
    rng = random.Random("duplicates")
    rows = [(f"S{i}", rng.randint(1, 50), rng.randint(1, 50)) for i in range(1, 19)]
    table = Table(("Student", "Points", "Points_2"), rows)
    return one(
        "duplicate-names",
        "exam.csv",
        write([("Student", "Points", "Points"), *[[a, str(b), str(c)] for a, b, c in rows]], ","),
        table,
        ask.sum_of(table, "Points_2"),
        ask.how_many_rows(table),
    )


def empty_tables() -> list[Case]:
    head = ("Name", "Amount", "Date")
    table = Table(head, [])
    return [
        one("header-only", "nothing.csv", write([head], ","), table, scalar("How many rows are there?", 0)),
        one(
            "header-only-titled",
            "nothing_yet.csv",
            write([["Report of January"], [], head], ";"),
            table,
            scalar("How many rows are there?", 0),
        ),
    ]


def arabic_digits() -> Case:
    rng = random.Random("arabic")
    rows = [
        (name, rng.randint(10, 900), rng.randint(1000, 99_000))
        for name in ("تفاح", "موز", "برتقال", "عنب", "تين", "رمان")
    ]
    table = Table(("المنتج", "الكمية", "السعر"), rows)
    digits = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
    return one(
        "arabic-digits",
        "products_ar.csv",
        write([table.names, *[[n, str(a).translate(digits), str(b).translate(digits)] for n, a, b in rows]], ","),
        table,
        ask.sum_of(table, "الكمية", "ما هو مجموع {}؟"),
    )


def yuan_and_yen_units() -> Case:
    rng = random.Random("yuan")
    rows = [
        (date(2024, 3, 1) + timedelta(days=i), f"客户{i}", rng.randint(1000, 9_999_999) / 100) for i in range(1, 16)
    ]
    table = Table(("日期", "客户", "金额"), rows)
    body = [[f"{d.year}年{d.month}月{d.day}日", name, f"{v:,.2f}元"] for d, name, v in rows]
    return one(
        "yuan",
        "账单.csv",
        write([table.names, *body], ",", encoding="gbk"),
        table,
        scalar("金额总计多少?", ask.total(table.column("金额"))),
        ask.latest(table, "日期"),
    )


def build() -> list[Case]:
    cases = [statement(kind) for kind in OLD_KINDS]
    makers = (
        years_as_columns,
        many_lines,
        carriage_returns,
        wide_characters,
        accounts,
        stock,
        survey,
        weather,
        log_times,
        inches,
        separator_line,
        table_in_txt,
        footer_notes,
        duplicate_names,
        arabic_digits,
        yuan_and_yen_units,
    )
    return [*cases, *(made() for made in makers), *empty_tables()]
