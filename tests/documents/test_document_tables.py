"""Tables as people export them: each value is read right, or stated as undecided; none is wrong in silence."""

from __future__ import annotations

import random
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_corpus import KINDS, SEEDS, equal, judge, read, write

from octollm.documents.layout import LayoutError, find_delimiter, is_summary_label, parse_lines
from octollm.documents.numbers import Shape, is_unit, parse_number_shape, read_number_column
from octollm.documents.tables import TableAssumption
from octollm.services.arms.executor import runner_sql
from octollm.services.arms.executor.runner_sql import RefusedError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_an_export_is_read_as_a_person_reads_it(kind: str, seed: int) -> None:
    outcome = judge(KINDS[kind](random.Random(f"{kind} {seed}")))
    expected = {"right", "stated", "undecided"} if kind == "undecided" else {"right", "stated"}
    assert outcome.verdict in expected, outcome.detail


def column(texts: list[str], *, delimiter: str = "\t", name: str = "value") -> tuple[list[Any], list[TableAssumption]]:
    """Read one column beside one of text; return its values and assumptions."""
    data = write([["key", name], *([f"k{number}", text] for number, text in enumerate(texts))], delimiter)
    _, rows, assumptions = read(data)
    return [row[1] for row in rows], assumptions


def is_open(assumptions: list[TableAssumption]) -> bool:
    return any(not each.decided for each in assumptions)


PLACES = st.integers(0, 4)
GROUPS = st.sampled_from(
    [(".", ","), (".", "'"), (".", " "), (".", ""), (",", "."), (",", "\u00a0"), (",", "’"), (",", "")]
)
SIGNS = st.sampled_from(["-{}", "({})", "{}-", "−{}"])
MONEY = st.sampled_from(["{}", "{}", "€ {}", "{} EUR", "${}", "CHF {}", "{} %", "Rs. {}", "{} kg"])


@st.composite
def written_numbers(draw: st.DrawFn) -> tuple[list[str], list[float]]:
    mark, group = draw(GROUPS)
    places, sign, money = draw(PLACES), draw(SIGNS), draw(MONEY)
    numbers = draw(st.lists(st.integers(-(10**10), 10**10), min_size=1, max_size=8))
    values = [Decimal(number).scaleb(-places) for number in numbers]
    texts: list[str] = []
    for value in values:
        text = f"{abs(value):,.{places}f}".replace(",", "G").replace(".", mark).replace("G", group)
        text = money.format(text)
        texts.append(sign.format(text) if value < 0 else text)
    return texts, [float(value) for value in values]


@given(written_numbers(), st.sampled_from(";\t,|"))
@settings(max_examples=60, deadline=None)
def test_a_written_number_is_read_back_or_stated_as_undecided(
    written: tuple[list[str], list[float]], delimiter: str
) -> None:
    texts, values = written
    found, assumptions = column(texts, delimiter=delimiter)
    if found == texts:
        assert any("kept as text" in each.text for each in assumptions)
    elif not all(map(equal, found, values)):
        assert is_open(assumptions), (texts, found)


FORMATS = ("%Y-%m-%d", "%d.%m.%Y", "%d.%m.%y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%Y/%m/%d", "%d %b %Y", "%B %d, %Y",
           "%d-%b-%y", "%a, %d %b %Y", "%d/%m/%y", "%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M", "%m/%d/%Y %I:%M %p",
           "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S.%f")  # fmt: skip


@given(
    st.lists(st.datetimes(datetime(1970, 1, 1), datetime(2068, 12, 31)), min_size=1, max_size=8),
    st.sampled_from(FORMATS),
)
@settings(max_examples=60, deadline=None)
def test_a_written_date_is_read_back_or_stated_as_undecided(values: list[datetime], form: str) -> None:
    texts = [value.strftime(form) for value in values]
    expected: list[Any] = [datetime.strptime(text, form) for text in texts]
    if "%H" not in form and "%I" not in form:
        expected = [value.date() for value in expected]
    found, assumptions = column(texts)
    if found != expected:
        assert is_open(assumptions), (texts, found)


@given(
    st.lists(st.lists(st.text(max_size=12), min_size=1, max_size=4), min_size=1, max_size=6), st.sampled_from(";\t,|")
)
@settings(max_examples=40, deadline=None)
def test_any_cells_are_a_table_or_refused(rows: list[list[str]], delimiter: str) -> None:
    data = write([[cell.replace("\r", "") for cell in row] for row in rows], delimiter, encoding="utf-8")
    try:
        names, found, _ = read(data)
    except (RefusedError, duckdb.Error) as error:
        assert str(error)
    else:
        assert len({name.lower() for name in names}) == len(names)
        assert len(found) <= sum(cell.count("\n") + 1 for row in rows for cell in row)


@given(st.text(max_size=300))
@settings(max_examples=40, deadline=None)
def test_any_text_is_a_table_or_refused(text: str) -> None:
    try:
        read(text.encode("utf-8", "replace"))
    except (RefusedError, duckdb.Error) as error:
        assert str(error)


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["1.234,56", "7,5"], [1234.56, 7.5]),
        (["1,234.56", "7.5"], [1234.56, 7.5]),
        (["12,34,567", "1,23,456"], [1234567, 123456]),
        (["1 234,5", "12 345,25"], [1234.5, 12345.25]),
        (["1'234.50", "12.50"], [1234.5, 12.5]),
        (["0.123", "1.234"], [0.123, 1.234]),
        (["0.123", "1.234", "12.345.678"], ["0.123", "1.234", "12.345.678"]),
        (["(250)", "250-", "-250", "−250", "+250"], [-250, -250, -250, -250, 250]),
        (["12.-", "12.50"], [12, 12.5]),
        (["12.5 %", "3 %"], [12.5, 3]),
        (["12E5", "77"], ["12E5", "77"]),
        (["1.5E3", "2.0e-2"], [1500, 0.02]),
        (["100.00 Dr", "50.00 Cr"], [-100, 50]),
        (["5", "-", "n/a", "#N/A", ""], [5, None, None, None, None]),
        (["01067", "99999"], ["01067", "99999"]),
        (["+49 170 1234567", "+49 30 123456"], ["+49 170 1234567", "+49 30 123456"]),
        (["1234567890123456", "5"], ["1234567890123456", "5"]),
        (["=1+2", "5"], ["=1+2", "5"]),
        (["123 456 789", "987 654 321"], ["123 456 789", "987 654 321"]),
        (["1.2.3", "1.2.4"], ["1.2.3", "1.2.4"]),
        (["192.168.0.1", "10.0.0.1"], ["192.168.0.1", "10.0.0.1"]),
        (["12-34-56", "65-43-21"], ["12-34-56", "65-43-21"]),
        (["yes", "no", "Yes"], [True, False, True]),
        (["ja", "nein"], [True, False]),
        (["no", "no"], ["no", "no"]),
        (["13/04/2024", "03/04/2024"], [date(2024, 4, 13), date(2024, 4, 3)]),
        (["04/13/2024", "03/04/2024"], [date(2024, 4, 13), date(2024, 3, 4)]),
        (["13/04/2024", "04/13/2024"], ["13/04/2024", "04/13/2024"]),
        (["31.02.2024", "01.02.2024"], ["31.02.2024", "01.02.2024"]),
        (["1. März 2024", "3. Mai 2024"], [date(2024, 3, 1), date(2024, 5, 3)]),
        (["1er janvier 2024", "14 août 2024"], [date(2024, 1, 1), date(2024, 8, 14)]),
        (["3 de mayo de 2024", "10 de enero de 2024"], [date(2024, 5, 3), date(2024, 1, 10)]),
        (["2024-03-01", "04.05.2024"], [date(2024, 3, 1), date(2024, 5, 4)]),
        (["14:05", "9:30"], [time(14, 5), time(9, 30)]),
        (["125:30", "9:30"], ["125:30", "9:30"]),
        (["2024-01-01T10:00:00Z"], [datetime(2024, 1, 1, 10)]),
        (
            ["01.02.2024 10:00:00,5", "01.02.2024 10:00:00,1234567"],
            [datetime(2024, 2, 1, 10, 0, 0, 500_000), datetime(2024, 2, 1, 10, 0, 0, 123_456)],
        ),
        (["2024-01-01T10:00:00+02:00", "2024-01-01T10:00:00+01:00"], None),
    ],
)
def test_a_column(texts: list[str], values: list[Any] | None) -> None:
    found, _ = column(texts)
    expected = texts if values is None else values
    assert len(found) == len(expected)
    assert all(map(equal, found, expected)), found


def test_eight_digits_are_a_date_where_the_name_says_so() -> None:
    assert column(["20240131"], name="date")[0] == [date(2024, 1, 31)]
    assert column(["20240131"], name="article")[0] == [20240131]


def test_excel_serial_numbers_in_text_stay_numbers() -> None:
    assert column(["45292"], name="date")[0] == [45292]


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["1.234", "2.500"], "'1.234' can be 1.234 or 1,234"),
        (["03/04/2024"], "03/04/2024 has the day or the month first"),
        (["5", "see note"], "mixed: 1 of 2 values"),
        (["500 g", "1 kg"], "different units"),
        (["1.234,5", "1,234.5"], "different notations"),
    ],
)
def test_what_the_file_does_not_decide_is_stated(texts: list[str], word: str) -> None:
    _, assumptions = column(texts)
    assert any(word in each.text for each in assumptions if not each.decided), assumptions


def test_a_sample_does_not_hide_a_rare_value() -> None:
    texts = [f"{number}" for number in range(20_000)]
    texts[12_345] = "x"
    found, assumptions = column(texts)
    assert found == texts
    assert any("'x'" in each.text for each in assumptions)


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("a;b\n1,5;2,5\n3,5;4,5\n", ";"),
        ("name;amount\nMüller, Hans;12,50\nMeier, Eva;13,20\n", ";"),
        ("id,tags\n1,a;b\n2,c;d\n", ","),
        ("a|b\n1|2\n", "|"),
        ("name,amount,note\na,1\nb,2,x\nc,3\nd,4,y\nSource: survey\n", ","),
        ("a\tb\nx, y\tz\n", "\t"),
        ("Betrag\n1.234,56\n2.500,00\n", "\x1f"),
        ("text\nHello, world\nGood, bye\n", "\x1f"),
    ],
)
def test_the_delimiter(text: str, delimiter: str) -> None:
    assert find_delimiter(text.splitlines(keepends=True)) == delimiter


@pytest.mark.parametrize(
    ("text", "names", "rows"),
    [
        ("sep=;\na;b\n1;2\n", ["a", "b"], [["1", "2"]]),
        ("Report\n\na,b\n1,2\n", ["a", "b"], [["1", "2"]]),
        ("Konto:;DE12\nDatum;Betrag\n01.01.2024;5\n", ["Datum", "Betrag"], [["01.01.2024", "5"]]),
        ("Region;2022;2023\nN;1;2\n", ["Region", "2022", "2023"], [["N", "1", "2"]]),
        ("t,v\n,[°C]\n1,2\n", ["t", "v"], [["1", "2"]]),
        ("a,b\n1,2\na,b\n3,4\n", ["a", "b"], [["1", "2"], ["3", "4"]]),
        ("a,b\n---,---\n1,2\n", ["a", "b"], [["1", "2"]]),
        ("a,A,,\n1,2,3,\n", ["a", "A_2", "column_3"], [["1", "2", "3"]]),
        (",Q1,Q2,Q1,Q2\nx,1,2,3,4\n", ["column_1", "Q1", "Q2", "Q1_2", "Q2_2"], [["x", "1", "2", "3", "4"]]),
        (",2022,,2023,\nRegion,Q1,Q2,Q1,Q2\nN,1,2,3,4\n",
         ["Region", "2022 Q1", "2022 Q2", "2023 Q1", "2023 Q2"], [["N", "1", "2", "3", "4"]]),
        ("a,b\n1,2\n\nx,y\n3,4\n", ["a", "b"], [["1", "2"]]),
    ],
)  # fmt: skip
def test_the_layout(text: str, names: list[str], rows: list[list[str]]) -> None:
    layout, data = parse_lines(text.splitlines(keepends=True))
    assert [row[: len(names)] for row in data] == rows
    assert layout.header == names


def test_one_column_that_may_be_several_is_stated_as_undecided() -> None:
    _, _, assumptions = read(b"a;b\nx\ny\nz\n")
    assert any("they may hold several" in each.text for each in assumptions if not each.decided)


def test_a_second_table_is_stated_as_undecided() -> None:
    _, rows, assumptions = read(b"a,b\n1,2\n\nx,y\n3,4\n")
    assert rows == [(1, 2)]
    assert [each.text for each in assumptions if not each.decided] == [
        "A second table begins in line 4 (x, y); it is not read."
    ]


@pytest.mark.parametrize(
    ("text", "rows", "word"),
    [
        ("n,v\na,1\nb,2\nTotal,3\n", 2, "is a total and left out"),
        ("n,v\na,1\nb,2\n,3\n", 2, "is a total and left out"),
        ("n,v\na,1\nb,2\nTotal,4\n", 2, "is no sum of the rows"),
        ("n,m,v\na,x,1\nTotal Energies,y,7\nb,z,2\n", 3, None),
    ],
)
def test_totals(text: str, rows: int, word: str | None) -> None:
    _, found, assumptions = read(text.encode())
    assert len(found) == rows
    texts = [each.text for each in assumptions]
    assert any(word in each for each in texts) if word else not any("total" in each for each in texts)


def test_lines_with_too_many_cells_are_stated_or_refused() -> None:
    _, rows, assumptions = read(b"a,b\n1,2\n3,4\n5,6,7\n8,9\n")
    assert rows == [(1, 2), (3, 4), (5, 6), (8, 9)]
    assert is_open(assumptions)
    with pytest.raises(LayoutError, match="line 1, the header, has 2 cells"):
        parse_lines(["a,b\n", "1,2,3\n", "4,5,6\n"])


def test_words() -> None:
    assert all(map(is_unit, ("kg", "[°C]", "(EUR)", "%", "km/h")))
    assert not any(map(is_unit, ("amount", "12", "")))
    assert is_summary_label("Zwischensumme:")
    assert is_summary_label("Total 2024")
    assert not is_summary_label("Total 2024", exactly=True)
    assert not is_summary_label("Summary of the year")


@pytest.mark.parametrize("pattern", ["", "9,", "99-99", "9 9", "9..9", "9,99,9", "-(9)", "EUR 9 EUR", "9.999.99"])
def test_no_numbers(pattern: str) -> None:
    assert parse_number_shape(Shape(pattern, 1, pattern, pattern)) is None


def test_a_column_of_two_notations_is_no_number() -> None:
    shapes = [Shape("9.999,99", 1, "1.234,56", "1.234,56"), Shape("9,999.99", 1, "1,234.56", "1,234.56")]
    assert "different notations" in str(read_number_column(shapes))


LONG_LINES = [
    f"{number % 28 + 1:02}.01.2024;Kunde {number};{number % 1000}.{number % 900 + 100},5{{}}" for number in range(3000)
]


@pytest.mark.parametrize(
    ("head", "space", "foot"),
    [
        ("Tag;Wer;Betrag\n", "", ""),
        ("Umsätze;;\n\nTag;Wer;Betrag\n", " ", "Summe;;{total}\n\nStand 31.12.2024;;\n"),
        ("Tag;Wer;Betrag\n", "", "\n01.02.2024;x\n01.02.2024;y;5;6\n"),
        ("Tag;Wer;Betrag\n", "", '01.02.2024;"x;y";5\n'),
    ],
)
def test_a_long_file_is_read_like_a_short_one(
    monkeypatch: pytest.MonkeyPatch, head: str, space: str, foot: str
) -> None:
    lines = [line.format(space) for line in LONG_LINES]
    total = sum((number % 1000) * 1000 + number % 900 + 100.5 for number in range(3000))
    written = f"{total:,.1f}".replace(",", "G").replace(".", ",").replace("G", ".")
    data = (head + "\n".join(lines) + "\n" + foot.format(total=written)).encode()
    monkeypatch.setattr(runner_sql, "LONG_FILE", 1 << 30)
    expected = read(data)
    monkeypatch.setattr(runner_sql, "LONG_FILE", 1 << 10)
    monkeypatch.setattr(runner_sql, "TAIL_BYTES", 1 << 10)
    assert read(data) == expected
    assert expected[1][7][2] == 7107.5


@pytest.mark.parametrize(
    ("text", "rows", "word"),
    [
        ("a,b,c,d\nx,1,2,3\ny,4,5,6\nMüller,,,\n", 2, "1 line after the table"),
        ("n,v,w\nNorth,,\na,1,2\nb,3,4\n", 3, "'North'; each is kept as data, but may head a section"),
        ("k,v\na,24/12/01\nb,24/11/02\n", 2, "24/11/02 may begin with the year"),
        ("1,2,3,4\nx,,,\n5,6,7,8\n", 3, "a first cell alone"),
    ],
)
def test_a_row_or_date_of_two_meanings_is_stated_as_undecided(text: str, rows: int, word: str) -> None:
    _, found, assumptions = read(text.encode())
    assert len(found) == rows
    assert any(word in each.text for each in assumptions if not each.decided), assumptions


def records(data: bytes) -> tuple[tuple[str, ...], list[tuple[Any, ...]], list[TableAssumption]]:
    return read(data, "json")


def test_texts_of_json_are_typed_like_those_of_a_text_file() -> None:
    data = '[{"a": "1.234,50 €", "z": "01067", "n": 1.5}, {"a": "2,00 €", "z": "10115", "n": null}]'.encode()
    names, rows, assumptions = records(data)
    assert (names, rows) == (("a", "z", "n"), [(1234.5, "01067", 1.5), (2.0, "10115", None)])
    assert any(each.text == "a: in €" for each in assumptions)


def test_json_whose_strings_have_two_readings_says_so() -> None:
    _, rows, assumptions = records(b'[{"a": "1.234"}, {"a": "2.500"}]')
    assert rows == [(1.234,), (2.5,)]
    assert is_open(assumptions)


def test_an_object_around_a_list_of_objects_is_left_out_and_stated() -> None:
    names, rows, assumptions = records(b'{"page": 1, "items": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]}')
    assert (names, rows) == (("a", "b"), [(1, "x"), (2, "y")])
    assert "'items'" in assumptions[0].text
    assert "page" in assumptions[0].text


def test_two_lists_of_objects_stay_as_they_are() -> None:
    names, rows, _ = records(b'{"one": [{"a": 1}], "two": [{"b": 2}]}')
    assert (names, len(rows)) == (("one", "two"), 1)


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["٤٠٠", "١٢", "٩٫٥"], [400, 12, 9.5]),
        (["１２", "３４５"], [12, 345]),
        (["1,234円", "56円"], [1234, 56]),
        (["12 rooms", "7 rooms"], [12, 7]),
        (["2024年3月2日", "2024年12月31日"], [date(2024, 3, 2), date(2024, 12, 31)]),
        (["2024. 3. 2.", "2024. 12. 31."], [date(2024, 3, 2), date(2024, 12, 31)]),
        (["12a", "13a"], None),
        (["1001 B", "1002 B"], None),
        (["شارع ٤", "شارع ٥"], None),
    ],
)
def test_notations_of_other_scripts(texts: list[str], values: list[Any] | None) -> None:
    found, assumptions = column(texts)
    assert found == (texts if values is None else values)
    assert not is_open(assumptions)


def test_numbers_with_different_words_stay_text_and_are_undecided() -> None:
    found, assumptions = column(["1.2 thousand", "3 million"])
    assert found == ["1.2 thousand", "3 million"]
    assert is_open(assumptions)


def test_a_total_with_an_unknown_label_is_known_by_its_sums() -> None:
    lines = ["day;item;count;price", "01.02.2024;a;2;3,50", "02.02.2024;b;1;4,00", "03.02.2024;c;5;1,25"]
    _, rows, assumptions = read("\n".join([*lines, "Ĉio;;8;8,75"]).encode())
    assert [row[0] for row in rows] == [date(2024, 2, 1), date(2024, 2, 2), date(2024, 2, 3)]
    assert "is the sum of the rows above" in assumptions[0].text
    _, rows, _ = read("\n".join([*lines, "Ĉio;;8;9,75"]).encode())
    assert len(rows) == 4
