"""Small tables as people export them, made from seeds, each with the values that a person reads in it.

``python tests/support/table_corpus.py`` prints how they are read, by kind.
"""

from __future__ import annotations

import csv
import io
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb

from octollm.documents.tables import TableAssumption
from octollm.services.arms.executor import runner_sql

SEEDS = range(6)


@dataclass(frozen=True)
class Sample:
    """The bytes of a file, and what a person reads in it: column names and rows of typed values."""

    data: bytes
    names: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Outcome:
    """How a sample was read: ``right``, ``stated`` (right, with assumptions), ``undecided`` (stated as such, and other
    than expected), ``refused`` or ``wrong``.
    """

    verdict: str
    detail: str = ""


def write(
    rows: Sequence[Sequence[str]], delimiter: str, *, encoding: str = "utf-8", quoting: int = csv.QUOTE_MINIMAL
) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="\r\n").writerows(rows)  # type: ignore[arg-type]
    return out.getvalue().encode(encoding)


def grouped(value: float, mark: str, group: str, places: int = 2) -> str:
    text = f"{abs(value):,.{places}f}".replace(",", "G").replace(".", mark).replace("G", group)
    return ("-" if value < 0 else "") + text


def indian(value: float) -> str:
    whole, places = f"{abs(value):.2f}".split(".")
    head, tail = whole[:-3], whole[-3:]
    groups: list[str] = []
    while head:
        groups.insert(0, head[-2:])
        head = head[:-2]
    return ",".join([*groups, tail]) + "." + places


def amounts(rng: random.Random, count: int, most: int = 500_000) -> list[float]:
    return [round(rng.choice((-1, -1, 1)) * rng.randint(100, most * 100) / 100, 2) for _ in range(count)]


def days(rng: random.Random, count: int) -> list[date]:
    first = date(2024, 1, 1) + timedelta(days=rng.randint(0, 60))
    return sorted(first + timedelta(days=rng.randint(0, 120)) for _ in range(count))


NAMES = (
    "REWE Markt",
    "Müller, Hans",
    "ACME Ltd",
    "Dupont & Fils",
    "Café Größe",
    "O'Neill",
    "Stadtwerke",
    "TOTAL ÉNERGIES",
)


def bank_de(rng: random.Random) -> Sample:
    n = rng.randint(4, 25)
    values, when = amounts(rng, n), days(rng, n)
    who = [rng.choice(NAMES) for _ in range(n)]
    body = [
        [f"{d:%d.%m.%Y}", f"{d:%d.%m.%y}", w, "Rechnung; Nr. 5", grouped(v, ",", "."), "EUR", ""]
        for d, w, v in zip(when, who, values, strict=True)
    ]
    head = ["Buchungstag", "Valuta", "Empfänger", "Verwendungszweck", "Betrag", "Währung", ""]
    title = [["Umsatzanzeige", "Konto DE12 5001 0517"], ["Zeitraum:", "01.01.2024 - 31.05.2024"], []]
    foot = [
        ["Summe", "", "", "", grouped(sum(values), ",", "."), "EUR", ""],
        [],
        ["Kontostand am 31.05.2024", "", "", "", grouped(9999.99, ",", "."), "EUR", ""],
    ]
    rows = [*(title if rng.random() < 0.7 else []), head, *body, *(foot if rng.random() < 0.7 else [])]
    expected = [(d, d, w, "Rechnung; Nr. 5", v, "EUR") for d, w, v in zip(when, who, values, strict=True)]
    return Sample(write(rows, ";", encoding=rng.choice(("cp1252", "utf-8-sig", "utf-16"))), tuple(head[:6]), expected)


def bank_fr(rng: random.Random) -> Sample:
    n = rng.randint(4, 20)
    values, when = amounts(rng, n), days(rng, n)
    space = rng.choice((" ", "\u00a0", "\u202f"))
    debit = [abs(v) if v < 0 else None for v in values]
    credit = [v if v >= 0 else None for v in values]
    head = ["Date", "Libellé", "Débit", "Crédit"]
    body = [
        [
            f"{d:%d/%m/%Y}",
            "VIR SEPA",
            "" if a is None else grouped(a, ",", space),
            "" if b is None else grouped(b, ",", space),
        ]
        for d, a, b in zip(when, debit, credit, strict=True)
    ]
    rows = [
        ["Relevé de compte n° 12345"],
        [],
        head,
        *body,
        [],
        ["Solde au 31/05/2024", "", "", grouped(1234.5, ",", space)],
    ]
    return Sample(
        write(rows, ";"), tuple(head), [(d, "VIR SEPA", a, b) for d, a, b in zip(when, debit, credit, strict=True)]
    )


def bank_ch(rng: random.Random) -> Sample:
    n = rng.randint(3, 20)
    values, when = amounts(rng, n), days(rng, n)
    mark = rng.choice(("'", "’"))
    head = ["Datum", "Buchungstext", "Betrag CHF", "Saldo"]
    saldo = [abs(v) * 3 for v in values]
    body = [
        [f"{d:%d.%m.%Y}", "Zahlung", grouped(v, ".", mark), "CHF " + grouped(s, ".", mark)]
        for d, v, s in zip(when, values, saldo, strict=True)
    ]
    return Sample(
        write([head, *body], ";"),
        tuple(head),
        [(d, "Zahlung", v, s) for d, v, s in zip(when, values, saldo, strict=True)],
    )


def bank_uk(rng: random.Random) -> Sample:
    n = rng.randint(5, 25)
    values, when = amounts(rng, n), days(rng, n)
    head = ["Transaction Date", "Sort Code", "Description", "Amount", "Settled"]
    settled = [rng.random() < 0.5 or i == 0 for i in range(n)]
    settled[-1] = False
    body = [
        [
            f"{d:%d/%m/%Y}",
            "12-34-56",
            "CARD PAYMENT",
            ("-" if v < 0 else "") + "£" + grouped(abs(v), ".", ","),
            "Yes" if s else "No",
        ]
        for d, v, s in zip(when, values, settled, strict=True)
    ]
    rows = [(d, "12-34-56", "CARD PAYMENT", v, s) for d, v, s in zip(when, values, settled, strict=True)]
    return Sample(write([head, *body], ","), tuple(head), rows)


def bank_in(rng: random.Random) -> Sample:
    n = rng.randint(4, 20)
    values, when = amounts(rng, n, 5_000_000), days(rng, n)
    head = ["Txn Date", "Narration", "Amount", "Ref No"]
    form = rng.choice(("%d-%b-%Y", "%d %b %Y", "%d/%m/%Y"))
    refs = [f"{rng.randint(0, 10**17):018}" for _ in range(n)]
    body = [
        [f"{d:{form}}", "UPI/xyz", f"{indian(v)} {'Dr' if v < 0 else 'Cr'}", r]
        for d, v, r in zip(when, values, refs, strict=True)
    ]
    rows = [(d, "UPI/xyz", v, r) for d, v, r in zip(when, values, refs, strict=True)]
    return Sample(
        write([["Account Statement"], [], head, *body, [], ["** end of statement **"]], ","), tuple(head), rows
    )


def bank_us(rng: random.Random) -> Sample:
    n = rng.randint(5, 25)
    values, when = amounts(rng, n), days(rng, n)
    head = ["Posted Date", "Payee", "Amount", "Check #"]

    def money(value: float) -> str:
        text = "$" + grouped(abs(value), ".", ",")
        return f"({text})" if value < 0 else text

    checks = [rng.choice((None, rng.randint(100, 9999))) for _ in range(n)]
    checks[0] = 1001
    body = [
        [f"{d:%m/%d/%Y}", "Walmart, Inc.", money(v), "" if c is None else str(c)]
        for d, v, c in zip(when, values, checks, strict=True)
    ]
    rows = [(d, "Walmart, Inc.", v, c) for d, v, c in zip(when, values, checks, strict=True)]
    return Sample(write([head, *body], ",", quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))), tuple(head), rows)


def invoice(rng: random.Random) -> Sample:
    n = rng.randint(2, 12)
    counts = [rng.randint(1, 40) for _ in range(n)]
    prices = [rng.randint(100, 250_000) / 100 for _ in range(n)]
    sums = [round(c * p, 2) for c, p in zip(counts, prices, strict=True)]
    german = rng.random() < 0.5
    mark, group, label = (",", ".", "Gesamtbetrag") if german else (".", ",", "Total")
    head = ["Pos", "Artikel", "Menge", "Einzelpreis", "MwSt", "Gesamt"]
    body = [
        [str(i + 1), f"Artikel {i}", str(c), grouped(p, mark, group) + " €", "19 %", grouped(s, mark, group) + " €"]
        for i, (c, p, s) in enumerate(zip(counts, prices, sums, strict=True))
    ]
    rows = [
        ["Rechnung 2024-17"],
        ["Kunde:", "Meier GmbH"],
        [],
        head,
        *body,
        ["", label, "", "", "", grouped(round(sum(sums), 2), mark, group) + " €"],
    ]
    expected = [
        (i + 1, f"Artikel {i}", c, p, 19, s) for i, (c, p, s) in enumerate(zip(counts, prices, sums, strict=True))
    ]
    return Sample(write(rows, ";"), tuple(head), expected)


def sensor(rng: random.Random) -> Sample:
    n = rng.randint(5, 60)
    start = datetime(2024, 3, 1, 6, 0)
    when = [start + timedelta(minutes=10 * i) for i in range(n)]
    temperature = [round(rng.uniform(-20, 40), 3) for _ in range(n)]
    pressure = [rng.choice((None, round(rng.uniform(950, 1050), 1))) for _ in range(n)]
    pressure[0] = 1013.2
    form = rng.choice(("%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M"))
    mark = rng.choice((".", ","))
    head = ["timestamp", "temperature", "pressure", "battery"]
    units = [["", "°C", "hPa", "V"]] if rng.random() < 0.5 else []
    missing = rng.choice(("NA", "", "-", "NaN"))
    body = [
        [
            f"{t:{form}}",
            f"{a:.3f}".replace(".", mark),
            missing if p is None else f"{p:.1f}".replace(".", mark),
            f"3{mark}30",
        ]
        for t, a, p in zip(when, temperature, pressure, strict=True)
    ]
    rows = [(t, a, p, 3.3) for t, a, p in zip(when, temperature, pressure, strict=True)]
    return Sample(
        write([head, *units, *body], "\t" if mark == "," else rng.choice(("\t", ",", "|"))), tuple(head), rows
    )


def staff(rng: random.Random) -> Sample:
    n = rng.randint(4, 25)
    hired = days(rng, n)
    zips = [f"{rng.randint(1000, 99999):05}" for _ in range(n)]
    zips[0] = "01067"
    phones = [f"+49 {rng.randint(100, 999)} {rng.randint(100000, 9999999)}" for _ in range(n)]
    active = [i % 3 != 0 for i in range(n)]
    salary = [rng.randint(30, 90) * 1000 for _ in range(n)]
    months = (
        "Januar",
        "Februar",
        "März",
        "April",
        "Mai",
        "Juni",
        "Juli",
        "August",
        "September",
        "Oktober",
        "November",
        "Dezember",
    )
    head = ["Personalnr", "Name", "PLZ", "Telefon", "Eintritt", "Aktiv", "Gehalt", "", ""]
    body = [
        [
            f"{i:06}",
            rng.choice(NAMES),
            z,
            p,
            f"{d.day}. {months[d.month - 1]} {d.year}",
            "ja" if a else "nein",
            str(s),
            "",
            "",
        ]
        for i, (z, p, d, a, s) in enumerate(zip(zips, phones, hired, active, salary, strict=True))
    ]
    rows = [
        (b[0], b[1], z, p, d, a, s) for b, z, p, d, a, s in zip(body, zips, phones, hired, active, salary, strict=True)
    ]
    return Sample(write([head, *body], rng.choice((";", ",", "\t"))), tuple(head[:7]), rows)


def no_header(rng: random.Random) -> Sample:
    n = rng.randint(2, 15)
    when, values = days(rng, n), amounts(rng, n)
    body = [[f"{d:%Y-%m-%d}", rng.choice(("north", "south")), f"{v:.2f}"] for d, v in zip(when, values, strict=True)]
    rows = [(d, b[1], v) for d, b, v in zip(when, body, values, strict=True)]
    return Sample(write(body, rng.choice((",", "|", "\t"))), ("column_1", "column_2", "column_3"), rows)


def subtotals(rng: random.Random) -> Sample:
    head = ["Region", "Product", "Units", "Revenue"]
    rows: list[list[str]] = []
    expected: list[tuple[Any, ...]] = []
    for region in ("North", "South", "West")[: rng.randint(2, 3)]:
        part = [(region, f"P{i}", rng.randint(1, 90), rng.randint(1000, 99999) / 100) for i in range(rng.randint(2, 5))]
        rows += [[a, b, str(c), f"{d:.2f}"] for a, b, c, d in part]
        rows.append([f"Subtotal {region}", "", str(sum(p[2] for p in part)), f"{sum(p[3] for p in part):.2f}"])
        expected += part
    rows.append(["Grand Total", "", str(sum(p[2] for p in expected)), f"{sum(p[3] for p in expected):.2f}"])
    return Sample(write([head, *rows], ","), tuple(head), expected)


def mixed(rng: random.Random) -> Sample:
    n = rng.randint(6, 20)
    scores = [str(rng.randint(1, 99)) for _ in range(n)]
    scores[rng.randrange(n)] = rng.choice(("see note", "absent", "ca. 5", "=A1+1", "12-15"))
    codes = [rng.choice(("1E5", "A12", "77")) for _ in range(n)]
    codes[0] = "1E5"
    iban = [f"DE{rng.randint(10**19, 10**20 - 1)}" for _ in range(n)]
    card = [str(rng.randint(10**15, 10**16 - 1)) for _ in range(n)]
    body = [list(row) for row in zip(scores, codes, iban, card, strict=True)]
    head = ["score", "code", "iban", "card"]
    return Sample(write([head, *body], ","), tuple(head), [tuple(row) for row in body])


def header_only(rng: random.Random) -> Sample:
    head = ["Name", "Age", "City", "Salary"][: rng.randint(2, 4)]
    title = [["Empty report"], []] if rng.random() < 0.3 else []
    return Sample(write([*title, head], rng.choice((",", ";", "\t"))), tuple(head), [])


def uneven(rng: random.Random) -> Sample:
    n = rng.randint(4, 15)
    values = [rng.randint(1, 999) for _ in range(n)]
    body = [[f"item {i}", str(v), "x"] if i % 3 else [f"item {i}", str(v)] for i, v in enumerate(values)]
    head = ["name", "amount", "amount"]
    rows = [(f"item {i}", v, "x" if i % 3 else None) for i, v in enumerate(values)]
    return Sample(write([head, *body, [], ["Source: survey 2024"]], ","), ("name", "amount", "amount_2"), rows)


def undecided(rng: random.Random) -> Sample:
    n = rng.randint(2, 12)
    values = [rng.randint(1001, 9999) for _ in range(n)]
    when = [date(2024, rng.randint(1, 12), rng.randint(1, 12)) for _ in range(n)]
    form = rng.choice(("%d/%m/%Y", "%m/%d/%Y"))
    group = rng.choice((".", ","))
    is_fraction = rng.random() < 0.5
    body = [[f"{d:{form}}", f"{v // 1000}{group}{v % 1000:03}"] for d, v in zip(when, values, strict=True)]
    rows = [(d, v / 1000 if is_fraction else v) for d, v in zip(when, values, strict=True)]
    return Sample(write([["day", "amount"], *body], rng.choice((";", "\t", ","))), ("day", "amount"), rows)


def decided_by_file(rng: random.Random) -> Sample:
    n = rng.randint(3, 12)
    values = [rng.randint(1001, 9999) for _ in range(n)]
    fees = [rng.randint(1, 999) / 100 for _ in range(n)]
    ordered = [date(2024, rng.randint(1, 12), rng.randint(1, 12)) for _ in range(n)]
    sent = [date(2024, 5, 13 + i) for i in range(n)]
    german = rng.random() < 0.5
    mark, group, form = (",", ".", "%d/%m/%Y") if german else (".", ",", "%m/%d/%Y")
    head = ["ordered", "sent", "amount", "fee"]
    body = [
        [f"{o:{form}}", f"{s:{form}}", grouped(v, mark, group, 0), grouped(f, mark, group)]
        for o, s, v, f in zip(ordered, sent, values, fees, strict=True)
    ]
    return Sample(write([head, *body], ";"), tuple(head), list(zip(ordered, sent, values, fees, strict=True)))


KINDS: dict[str, Callable[[random.Random], Sample]] = {
    made.__name__: made
    for made in (
        bank_de,
        bank_fr,
        bank_ch,
        bank_uk,
        bank_in,
        bank_us,
        invoice,
        sensor,
        staff,
        no_header,
        subtotals,
        mixed,
        header_only,
        uneven,
        decided_by_file,
        undecided,
    )
}


def read(data: bytes, kind: str = "csv") -> tuple[tuple[str, ...], list[tuple[Any, ...]], list[TableAssumption]]:
    """Read a file as the program in the sandbox does; return names, rows and assumptions."""
    with tempfile.TemporaryDirectory() as folder, duckdb.connect(config={"threads": 1}) as connection:
        path = Path(folder, "table.csv")
        path.write_bytes(data)
        assumptions = runner_sql.load(connection, "t", path, kind)
        found = connection.execute("FROM t")
        names = tuple(str(column[0]) for column in found.description or ())
        return names, found.fetchall(), assumptions


def equal(read: Any, expected: Any) -> bool:
    if isinstance(read, bool) or isinstance(expected, bool) or isinstance(read, str) or isinstance(expected, str):
        return type(read) is type(expected) and read == expected
    if isinstance(read, int | float) and isinstance(expected, int | float):
        return abs(read - expected) <= 1e-9 * max(1.0, abs(expected))
    return read == expected


def judge(sample: Sample) -> Outcome:
    """Compare what is read with what a person reads. A difference that is stated as undecided is no silent one."""
    try:
        names, rows, assumptions = read(sample.data)
    except (runner_sql.RefusedError, duckdb.Error) as error:
        return Outcome("refused", str(error))
    open_columns = {each.column for each in assumptions if not each.decided}
    if names != sample.names or len(rows) != len(sample.rows):
        detail = f"{names} with {len(rows)} rows, not {sample.names} with {len(sample.rows)}; {assumptions}"
        return Outcome("undecided" if "" in open_columns else "wrong", detail)
    for number, name in enumerate(names):
        for row, expected in zip(rows, sample.rows, strict=True):
            if not equal(row[number], expected[number]):
                detail = f"{name}: {row[number]!r}, not {expected[number]!r}; {assumptions}"
                return Outcome("undecided" if name in open_columns else "wrong", detail)
    return Outcome("stated" if assumptions else "right")


def main() -> None:
    """Print how the samples of each kind are read."""
    verdicts = ("right", "stated", "undecided", "refused", "wrong")
    print(f"{'kind':<16}" + "".join(f"{verdict:>10}" for verdict in verdicts))
    whole: Counter[str] = Counter()
    for name, make in KINDS.items():
        counts: Counter[str] = Counter()
        for seed in SEEDS:
            outcome = judge(make(random.Random(f"{name} {seed}")))
            counts[outcome.verdict] += 1
            if outcome.verdict in ("refused", "wrong"):
                print(f"  {name} {seed}: {outcome.verdict}: {outcome.detail[:600]}")
        whole += counts
        print(f"{name:<16}" + "".join(f"{counts[verdict]:>10}" for verdict in verdicts))
    print(f"{'all':<16}" + "".join(f"{whole[verdict]:>10}" for verdict in verdicts))


if __name__ == "__main__":
    main()
