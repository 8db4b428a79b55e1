from __future__ import annotations

import pytest

from octollm.contracts.operations import format_cell, parse_result_set
from octollm.errors import OctoError


def test_reads_what_the_executor_prints() -> None:
    table = parse_result_set(
        '{"columns":["a","b"],"types":["X","Y"],"rows":[[1,null],["x",{"k":[1]}]],"row_count":7,"truncated":true}'
    )
    assert table.columns == ("a", "b")
    assert table.rows == ((1, None), ("x", {"k": [1]}))
    assert table.row_count == 7


@pytest.mark.parametrize("stdout", ["", "x", "{}", '{"columns":["a"],"rows":[[1,2]],"row_count":1}'])
def test_anything_else_is_refused(stdout: str) -> None:
    with pytest.raises(OctoError) as caught:
        parse_result_set(stdout)
    assert caught.value.code == "peer_protocol"


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "NULL"), (True, "true"), (3, "3"), (3.0, "3"), (0.1 + 0.2, "0.3"), ("a\nb", "a b"), ([1, "x"], '[1,"x"]')],
)
def test_cells_as_a_reader_sees_them(cell: object, text: str) -> None:
    assert format_cell(cell) == text  # type: ignore[arg-type]
