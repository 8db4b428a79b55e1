"""Sales of sixteen countries, each in its own language, notation and encoding."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from table_corpus import grouped, write

from answer_corpus import questions as ask
from answer_corpus.model import Case, Table, scalar, table_name


@dataclass(frozen=True)
class Country:
    """How a country's programs export a table: words, notation and encoding."""

    head: tuple[str, str, str, str]
    items: tuple[str, ...]
    title: str
    label: str
    """The label of a total."""
    encoding: str
    delimiter: str
    mark: str
    group: str
    money: str
    day: str
    question: str
    """A question for the sum of the last column, in the language of the file."""


COUNTRIES = {
    "pl": Country(
        ("Data", "Produkt", "Ilość", "Kwota"),
        ("Śruba", "Gwóźdź", "Żarówka", "Łopata"),
        "Zestawienie sprzedaży",
        "Suma",
        "cp1250",
        ";",
        ",",
        " ",
        "{} zł",
        "%d.%m.%Y",
        "Jaka jest suma kolumny Kwota?",
    ),
    "cz": Country(
        ("Datum", "Zboží", "Množství", "Cena"),
        ("Šroub", "Hřebík", "Žárovka", "Lopata"),
        "Přehled prodeje",
        "Celkem",
        "cp1250",
        ";",
        ",",
        "\u00a0",
        "{} Kč",
        "%d.%m.%Y",
        "Jaký je součet sloupce Cena?",
    ),
    "se": Country(
        ("Datum", "Artikel", "Antal", "Belopp"),
        ("Skruv", "Spik", "Lampa", "Spade"),
        "Försäljning",
        "Summa",
        "utf-8",
        "\t",
        ",",
        " ",
        "{} kr",
        "%Y-%m-%d",
        "Vad är summan av Belopp?",
    ),
    "br": Country(
        ("Data", "Produto", "Quantidade", "Valor"),
        ("Parafuso", "Prego", "Lâmpada", "Pá"),
        "Relatório de vendas",
        "Total",
        "latin-1",
        ";",
        ",",
        ".",
        "R$ {}",
        "%d/%m/%Y",
        "Qual é a soma de Valor?",
    ),
    "jp": Country(
        ("日付", "商品", "数量", "金額"),
        ("ねじ", "釘", "電球", "シャベル"),
        "売上一覧",
        "合計",
        "cp932",
        ",",
        ".",
        ",",
        "{}円",
        "%Y/%m/%d",
        "金額の合計はいくらですか",
    ),
    "cn": Country(
        ("日期", "商品", "数量", "金额"),
        ("螺丝", "钉子", "灯泡", "铲子"),
        "销售清单",
        "合计",
        "gb18030",
        ",",
        ".",
        ",",
        "￥{}",
        "%Y-%m-%d",
        "金额的总和是多少?",
    ),
    "kr": Country(
        ("날짜", "상품", "수량", "금액"),
        ("나사", "못", "전구", "삽"),
        "판매 목록",
        "합계",
        "cp949",
        ",",
        ".",
        ",",
        "{}원",
        "%Y-%m-%d",
        "금액의 합계는 얼마입니까?",
    ),
    "ru": Country(
        ("Дата", "Товар", "Количество", "Сумма"),
        ("Винт", "Гвоздь", "Лампа", "Лопата"),
        "Отчёт о продажах",
        "Итого",
        "cp1251",
        ";",
        ",",
        " ",
        "{} руб.",
        "%d.%m.%Y",
        "Какова сумма столбца Сумма?",
    ),
    "es": Country(
        ("Fecha", "Producto", "Cantidad", "Importe"),
        ("Tornillo", "Clavo", "Bombilla", "Pala"),
        "Informe de ventas",
        "Total",
        "cp1252",
        ";",
        ",",
        ".",
        "{} €",
        "%d/%m/%Y",
        "¿Cuál es la suma de Importe?",
    ),
    "it": Country(
        ("Data", "Prodotto", "Quantità", "Importo"),
        ("Vite", "Chiodo", "Lampada", "Pala"),
        "Elenco vendite",
        "Totale",
        "utf-8-sig",
        ";",
        ",",
        ".",
        "€ {}",
        "%d/%m/%Y",
        "Qual è la somma di Importo?",
    ),
    "tr": Country(
        ("Tarih", "Ürün", "Adet", "Tutar"),
        ("Vida", "Çivi", "Işık", "Kürek"),
        "Satış listesi",
        "Toplam",
        "cp1254",
        ";",
        ",",
        ".",
        "{} TL",
        "%d.%m.%Y",
        "Tutar toplamı nedir?",
    ),
    "gr": Country(
        ("Ημερομηνία", "Προϊόν", "Ποσότητα", "Ποσό"),
        ("Βίδα", "Καρφί", "Λάμπα", "Φτυάρι"),
        "Πωλήσεις",
        "Σύνολο",
        "cp1253",
        ";",
        ",",
        ".",
        "{} €",
        "%d/%m/%Y",
        "Ποιο είναι το άθροισμα του Ποσό;",
    ),
    "hu": Country(
        ("Dátum", "Termék", "Mennyiség", "Összeg"),
        ("Csavar", "Szög", "Lámpa", "Ásó"),
        "Eladások",
        "Összesen",
        "utf-16",
        ";",
        ",",
        " ",
        "{} Ft",
        "%Y.%m.%d",
        "Mennyi az Összeg összege?",
    ),
    "nl": Country(
        ("Datum", "Artikel", "Aantal", "Bedrag"),
        ("Schroef", "Spijker", "Lamp", "Schop"),
        "Verkoopoverzicht",
        "Totaal",
        "utf-8",
        ";",
        ",",
        ".",
        "€ {}",
        "%d-%m-%Y",
        "Wat is de som van Bedrag?",
    ),
    "in": Country(
        ("Date", "Item", "Quantity", "Amount"),
        ("Screw", "Nail", "Bulb", "Spade"),
        "Sales report",
        "Total",
        "utf-8",
        ",",
        ".",
        ",",
        "₹{}",
        "%d-%b-%Y",
        "What is the total of Amount?",
    ),
    "fi": Country(
        ("Päivä", "Tuote", "Määrä", "Summa"),
        ("Ruuvi", "Naula", "Lamppu", "Lapio"),
        "Myynti",
        "Yhteensä",
        "utf-8",
        ";",
        ",",
        "\u00a0",
        "{} €",
        "%d.%m.%Y",
        "Mikä on Summa yhteensä?",
    ),
}


def export(code: str, country: Country) -> Case:
    rng = random.Random(f"export {code}")
    n = rng.randint(8, 40)
    first = date(2024, 1, 1) + timedelta(days=rng.randint(0, 200))
    days = sorted(first + timedelta(days=rng.randint(0, 150)) for _ in range(n))
    places = 0 if code in ("jp", "kr", "hu") else 2
    rows: list[tuple[Any, ...]] = []
    for day in days:
        amount = rng.randint(100, 900_000) if not places else rng.randint(100, 90_000_000) / 100
        rows.append((day, rng.choice(country.items), rng.randint(1, 400), amount))
    # One amount is grouped and one has a proof of its notation, as in any longer export.
    rows[0] = (*rows[0][:3], 1_234_567 if not places else 12_345.5)
    body = [
        [
            f"{day:{country.day}}",
            item,
            str(count),
            country.money.format(grouped(amount, country.mark, country.group, places)),
        ]
        for day, item, count, amount in rows
    ]
    table = Table(country.head, rows)
    lines = [list(country.head), *body]
    if rng.random() < 0.6:
        lines = [[country.title], [], *lines]
    if rng.random() < 0.6:
        amount = country.money.format(
            grouped(ask.total(table.column(country.head[3])), country.mark, country.group, places)
        )
        lines.append([country.label, "", str(sum(table.column(country.head[2]))), amount])
    day, item, count, money = country.head
    asked = ask.choose(
        rng,
        2,
        ask.how_many_rows(table),
        ask.label_of_highest(table, item, money),
        ask.sum_per(table, count, item),
        ask.latest(table, day),
        ask.count_above(table, count, 200),
        ask.sum_in_month(table, money, day),
        ask.sum_where(table, money, item, rows[0][1]),
    )
    name = f"export_{code}.csv"
    return Case(
        f"export-{code}",
        "csv",
        {name: write(lines, country.delimiter, encoding=country.encoding)},
        {table_name(name): table},
        questions=(scalar(country.question, ask.total(table.column(money))), *asked),
    )


def build() -> list[Case]:
    return [export(code, country) for code, country in COUNTRIES.items()]
