"""Joins of two tables, and tables that do not settle how they are read."""

from __future__ import annotations

import json
import random
from collections import defaultdict

import document_files as made
from table_corpus import write

from answer_corpus import questions as ask
from answer_corpus.model import Case, Question, Table, scalar
from answer_corpus.structured_tables import as_json, as_text, customers, orders, with_header


def joins() -> list[Case]:
    cases: list[Case] = []
    for number, form in enumerate(("csv", "json", "xlsx", "mixed")):
        rng = random.Random(f"join {form}")
        sold, people = orders(rng, 30 + number), customers(rng)
        city = {identity: home for identity, _, home in people.rows}
        name = {identity: who for identity, who, _ in people.rows}
        by_name: defaultdict[str, list[float]] = defaultdict(list)
        by_city: defaultdict[str, list[float]] = defaultdict(list)
        for _, who, _, amount, _ in sold.rows:
            by_name[name[who]].append(amount)
            by_city[city[who]].append(amount)
        best = max(by_name, key=lambda each: sum(by_name[each]))
        where = sorted(by_city)[0]
        asked = (
            scalar("Which customer_name has the highest total amount?", best),
            scalar(f"What is the total amount of the orders of customers in {where}?", ask.total(by_city[where])),
            Question(
                "What is the total amount per city?",
                rows=tuple((each, ask.total(values)) for each, values in by_city.items()),
            ),
        )
        tables = {"orders": sold, "customers": people}
        if form == "xlsx":
            files = {"shop.xlsx": made.workbook({"orders": with_header(sold), "customers": with_header(people)})}
            tables = {"shop_orders": sold, "shop_customers": people}
        elif form == "json":
            files = {
                "orders.json": json.dumps(as_json(sold)).encode(),
                "customers.jsonl": "\n".join(map(json.dumps, as_json(people))).encode(),
            }
        elif form == "mixed":
            files = {"orders.csv": as_text(sold), "customers.xlsx": made.workbook({"People": with_header(people)})}
        else:
            files = {"orders.csv": as_text(sold), "customers.csv": as_text(people)}
        cases.append(Case(f"join-{form}", "join", files, tables, questions=asked, is_plain=form in ("csv", "json")))
    rng = random.Random("join other names")
    goods = Table(
        ("sku", "title", "group"), [(f"0{i:03}", f"Thing {i}", rng.choice(("toys", "books"))) for i in range(1, 16)]
    )
    sales = Table(("article", "units"), [(f"0{rng.randint(1, 15):03}", rng.randint(1, 20)) for _ in range(40)])
    group = {sku: each for sku, _, each in goods.rows}
    toys = sum(units for article, units in sales.rows if group[article] == "toys")
    cases.append(
        Case(
            "join-other-names",
            "join",
            {"goods.csv": as_text(goods), "sales.csv": as_text(sales)},
            {"goods": goods, "sales": sales},
            questions=(
                scalar("How many units of goods of the group toys were sold? article in sales is sku in goods.", toys),
            ),
        )
    )
    return cases


def ambiguous() -> list[Case]:
    """Return tables that have two readings; ``tables`` is empty, for a person cannot tell either."""
    rng = random.Random("ambiguous")
    places = [f"place {i}" for i in range(1, 13)]

    def case(identity: str, head: list[str], rows: list[list[str]], text: str, delimiter: str = ",") -> Case:
        name = identity.replace("-", "_") + ".csv"
        return Case(
            f"open-{identity}",
            "ambiguous",
            {name: write([head, *rows], delimiter)},
            is_open=True,
            questions=(Question(text),),
        )

    thousands = [f"{rng.randint(1, 9)}.{rng.randint(100, 999)}" for _ in places]
    commas = [f"{rng.randint(1, 9)},{rng.randint(100, 999)}" for _ in places]
    days = [f"{rng.randint(1, 12):02}/{rng.randint(1, 12):02}/2024" for _ in places]
    short = [f"{rng.randint(1, 12):02}/{rng.randint(1, 12):02}/24" for _ in places]
    kinds = [rng.choice(("EUR", "USD")) for _ in places]
    kinds[0], kinds[1] = "EUR", "USD"
    weights = [f"{rng.randint(1, 90)} {('kg', 'lb')[i % 2]}" for i in range(12)]
    shares = [f"{rng.randint(1, 90)}" + (" %" if i % 3 else "") for i in range(12)]
    mixed = [str(rng.randint(1, 90)) if i % 4 else "about 20" for i in range(12)]
    both = ["1.234,50" if i % 2 else "1,234.50" for i in range(12)]
    bad = [f"{1 + i:02}.01.2024" if i else "31.02.2024" for i in range(12)]
    rows = list(zip(places, thousands, commas, days, short, kinds, weights, shares, mixed, both, bad, strict=True))
    return [
        case("points", ["place", "visitors"], [[r[0], r[1]] for r in rows], "What is the sum of visitors?"),
        case("commas", ["place", "visitors"], [[r[0], r[2]] for r in rows], "What is the sum of visitors?", "\t"),
        case(
            "points-semicolon",
            ["place", "visitors"],
            [[r[0], r[1]] for r in rows],
            "What is the highest visitors?",
            ";",
        ),
        case("days", ["place", "opened"], [[r[0], r[3]] for r in rows], "What is the latest opened?"),
        case("short-days", ["place", "opened"], [[r[0], r[4]] for r in rows], "What is the earliest opened?", ";"),
        case(
            "currencies",
            ["place", "cost"],
            [[r[0], f"{20 + i} {r[5]}"] for i, r in enumerate(rows)],
            "What is the sum of cost?",
        ),
        case("weights", ["place", "weight"], [[r[0], r[6]] for r in rows], "What is the sum of weight?"),
        case("shares", ["place", "share"], [[r[0], r[7]] for r in rows], "What is the highest share?"),
        case("mixed", ["place", "guests"], [[r[0], r[8]] for r in rows], "What is the sum of guests?"),
        case("two-notations", ["place", "cost"], [[r[0], r[9]] for r in rows], "What is the sum of cost?", ";"),
        case("no-such-day", ["place", "opened"], [[r[0], r[10]] for r in rows], "What is the earliest opened?", ";"),
        case(
            "too-many-cells",
            ["place", "guests"],
            [[r[0], str(i), *(["x"] if i == 5 else [])] for i, r in enumerate(rows)],
            "What is the sum of guests?",
        ),
        case(
            "two-tables",
            ["place", "guests"],
            [*[[r[0], str(i)] for i, r in enumerate(rows)], [], ["city", "guides"], ["A", "4"], ["B", "7"]],
            "What is the sum of guests?",
        ),
        case(
            "sections",
            ["place", "guests", "rooms"],
            [
                ["North", "", ""],
                *[[r[0], str(i), "3"] for i, r in enumerate(rows[:6])],
                ["South", "", ""],
                *[[r[0], str(i), "2"] for i, r in enumerate(rows[6:])],
            ],
            "How many rows are there?",
        ),
    ]


def build() -> list[Case]:
    return [*joins(), *ambiguous()]
