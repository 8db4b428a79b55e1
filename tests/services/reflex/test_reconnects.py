"""Watchers that reconnect at random to two gateways, one of which is replaced, lose nothing and get nothing twice."""

from __future__ import annotations

from pathlib import Path

from reconnect_kit import run_reconnects


async def test_nothing_is_lost_or_doubled_over_reconnects_across_gateways(tmp_path: Path) -> None:
    result = await run_reconnects(tmp_path, watchers=24, cuts=8)
    assert (result.lost, result.doubled, result.wrong_texts, result.incomplete) == (0, 0, 0, 0), result
    assert result.reconnects >= 24 * 8
