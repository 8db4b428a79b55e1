"""The rows of a query as they travel: JSON in ``RunResult.stdout``, and how a cell is shown to a reader."""

from __future__ import annotations

import msgspec

from octollm.errors import OctoError

Cell = str | int | float | bool | list[object] | dict[str, object] | None


class ResultSet(msgspec.Struct, frozen=True):
    """What a query answered. ``rows`` hold a cell per column; ``row_count`` counts those that were left out too."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    row_count: int


def parse_result_set(stdout: str) -> ResultSet:
    """Read the executor's answer to an SQL run. Raises ``OctoError`` (``peer_protocol``) on anything else."""
    try:
        table = msgspec.json.decode(stdout.encode(), type=ResultSet)
    except msgspec.DecodeError as exc:
        raise OctoError("The executor's rows are not in the form of a table.", code="peer_protocol") from exc
    if any(len(row) != len(table.columns) for row in table.rows):
        raise OctoError("A row of the executor's has another number of cells.", code="peer_protocol")
    return table


def format_cell(cell: Cell) -> str:
    """Show a cell: what SQL calls NULL as ``NULL``; a float to twelve digits, so that 0.1 + 0.2 reads 0.3."""
    if cell is None:
        return "NULL"
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else f"{cell:.12g}"
    if isinstance(cell, list | dict):
        return msgspec.json.encode(cell).decode()
    return " ".join(str(cell).split("\n"))
