"""Spreadsheets as tables of a query: their sheets, typed cells, and what is around the data."""

from __future__ import annotations

import json
from datetime import date, datetime
from typing import Any

import document_files as made
import pytest

from octollm.contracts.operations import RunRequest
from octollm.documents.layout import parse_cells
from octollm.documents.model import DocumentError, Location, RawTable, encode_cells
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.runner import Runner, derive_tables, is_spreadsheet

ROWS = [
    ["Prices of the year"],
    [],
    ["item", "price", "sold", "code"],
    ["lamp", 1.234, date(2024, 3, 31), "01067"],
    ["desk", 2.5, date(2024, 4, 1), "10115"],
    ["Total", 3.734, None, None],
]


@pytest.fixture
def runner(bubblewrap: Bubblewrap) -> Runner:
    return Runner(bubblewrap)


async def answer(runner: Runner, query: str, files: dict[str, bytes]) -> dict[str, Any]:
    result = await runner.run(RunRequest("sql", (query,)), files)
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.mark.sandbox
async def test_a_workbook_is_a_table(runner: Runner) -> None:
    files = {"prices.xlsx": made.workbook({"Prices": ROWS})}
    found = await answer(runner, "SELECT item, price, sold, code, typeof(price) AS t FROM prices ORDER BY price", files)
    assert found["rows"] == [
        ["lamp", 1.234, "2024-03-31", "01067", "DOUBLE"],
        ["desk", 2.5, "2024-04-01", "10115", "DOUBLE"],
    ]
    assert all(each["decided"] for each in found["assumptions"])
    assert any("is a total and left out" in each["text"] for each in found["assumptions"])


@pytest.mark.sandbox
async def test_a_formula_without_a_stored_result_leaves_the_answer_undecided(runner: Runner) -> None:
    files = {"costs.xlsx": made.workbook({"S": [["item", "amount"], ["a", 2], ["b", "=B2*10"]]})}
    found = await answer(runner, "SELECT sum(amount) AS s FROM costs", files)
    assert found["rows"] == [[2]]
    (assumption,) = found["assumptions"]
    assert assumption["text"] == "undecided: 1 formula has no stored result, the first in B3; read as empty"
    assert not assumption["decided"]


@pytest.mark.sandbox
async def test_sheets_and_files_are_joined(runner: Runner) -> None:
    files = {
        "shop.xlsx": made.workbook({"Items": [["id", "name"], [1, "lamp"]], "Sales": [["id", "n"], [1, 5], [1, 6]]}),
        "costs.csv": b"id,cost\n1,2.5\n",
    }
    tables = "shop_items JOIN shop_sales USING (id) JOIN costs USING (id)"
    query = f"SELECT name, sum(n) AS n, min(cost) AS c FROM {tables} GROUP BY 1"
    assert (await answer(runner, query, files))["rows"] == [["lamp", 11, 2.5]]


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.xls", made.old_workbook([["n", "v"], ["x", 1.5]])),
        ("a.ods", made.open_document([["n", "v"], ["x", 1.5]])),
        ("text.xls", b"n\tv\nx\t1.5\n"),
        ("misnamed.csv", made.workbook({"S": [["n", "v"], ["x", 1.5]]})),
    ],
)
async def test_other_spreadsheets(runner: Runner, name: str, data: bytes) -> None:
    assert (await answer(runner, "SELECT n, v FROM data", {name: data}))["rows"] == [["x", 1.5]]


@pytest.mark.sandbox
async def test_an_encrypted_workbook_says_so(runner: Runner) -> None:
    with pytest.raises(DocumentError) as caught:
        await runner.run(RunRequest("sql", ("FROM data",)), {"a.xlsx": made.encrypted_office_file()})
    assert caught.value.code == "file_encrypted"


@pytest.mark.sandbox
async def test_an_answer_from_a_hidden_sheet_says_so_and_one_from_another_sheet_does_not(runner: Runner) -> None:
    sheets = {"Stock": [["id", "n"], [1, 5]], "Costs": [["id", "cost"], [1, 7]]}
    files = {"shop.xlsx": made.workbook(sheets, hidden=["Costs"])}
    found = await answer(runner, "SELECT cost FROM shop_costs", files)
    assert [each["text"] for each in found["assumptions"]] == ["sheet Costs is hidden in the workbook, but read"]
    assert (await answer(runner, "SELECT n FROM shop_stock", files))["assumptions"] == []


def test_the_names_of_tables() -> None:
    one, two = RawTable("Prices 2024", [["a"]]), RawTable("Notes", [["b"]])
    tables = derive_tables(["x.xlsx", "y.ods", "z.csv"], {"x.xlsx": [one, two], "y.ods": [one, RawTable("Empty", [])]})
    assert [(each.file, each.table, each.kind) for each in tables] == [
        ("x.xlsx, sheet Prices 2024", "x_prices_2024", "cells"),
        ("x.xlsx, sheet Notes", "x_notes", "cells"),
        ("y.ods", "y", "cells"),
        ("z.csv", "z", "csv"),
    ]


def test_a_spreadsheet_is_known_by_its_content() -> None:
    assert is_spreadsheet("a.csv", made.workbook({"S": [["n"]]}))
    assert not is_spreadsheet("a.xlsx", b"n\n1\n")
    assert not is_spreadsheet("a.zip", made.archive({"b.txt": b"x"}))


def test_cells_keep_their_rows_and_types() -> None:
    table = RawTable("S", [["n", "d", "t"], [1, date(2024, 1, 2), datetime(2024, 1, 2, 3, 4)], ["-", None, None]],
                     Location(sheet="S", cells="B3:D5"))  # fmt: skip
    sheet = json.loads(encode_cells(table))
    assert sheet["first_row"] == 3
    layout, rows = parse_cells(sheet["rows"], sheet["first_row"])
    assert list(rows) == [["1", "2024-01-02", "2024-01-02 03:04:00"], ["-", "", ""]]
    assert (layout.header, layout.numeric, layout.start) == (["n", "d", "t"], frozenset({0}), 3)
