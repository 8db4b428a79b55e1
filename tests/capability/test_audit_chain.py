"""The sealed chain of the audit log: whatever is done to it is found, and named."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.capability import CapabilityError, Principal, RootMinter, SigningKey
from octollm.capability.audit_chain import AuditChainVerifier, row_hash, sign_checkpoint, verify_checkpoint
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.observability import AuditHead, AuditRow

ROOT = SigningKey.generate("root")
OTHER = SigningKey.generate("root")
ROOTS = {ROOT.thumbprint: ROOT.public}
NOW = 1_800_000_000.0


def sealed(count: int, *, tenant: str = "acme", key: SigningKey = ROOT, batch: int = 3) -> list[AuditRow]:
    """Return a chain; every ``batch`` rows, and the last, have a checkpoint."""
    rows: list[AuditRow] = []
    digest = ""
    for seq in range(1, count + 1):
        row = AuditRow(seq, tenant, NOW + seq, "task.created", "alice", "key-1", "", f"task-{seq}", None, "", "", "")
        digest = row_hash(digest, row)
        signed = sign_checkpoint(key, tenant, seq, digest, NOW) if seq % batch == 0 or seq == count else None
        rows.append(msgspec.structs.replace(row, hash=digest, checkpoint=signed))
    return rows


def head_of(rows: list[AuditRow], tenant: str = "acme") -> AuditHead:
    if not rows:
        return AuditHead(tenant)
    return AuditHead(tenant, rows[-1].seq, rows[-1].hash, rows[-1].checkpoint or "")


def faults(rows: list[AuditRow], head: AuditHead) -> list[tuple[int, str]]:
    check = AuditChainVerifier("acme", ROOTS)
    for row in rows:
        check.check_row(row)
    check.check_head(head)
    return [(fault.seq, fault.what) for fault in check.faults]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_what_was_sealed_is_found_as_it_was(count: int) -> None:
    rows = sealed(count)
    assert faults(rows, head_of(rows)) == []


FIELDS = ("at", "action", "sub", "cred", "service", "target", "detail", "request_id", "correlation_id")


@pytest.mark.parametrize("name", FIELDS)
def test_a_changed_row_is_named_and_no_other(name: str) -> None:
    rows = sealed(7)
    value = {"at": 1.0, "detail": {"name": "x"}}.get(name, "other")
    changed = [*rows]
    changed[3] = msgspec.structs.replace(rows[3], **{name: value})
    found = faults(changed, head_of(rows))
    assert [seq for seq, _ in found] == [4]
    assert "changed" in found[0][1]


@given(st.integers(1, 8), st.data())
def test_removed_rows_are_named(count: int, data: st.DataObject) -> None:
    rows = sealed(8)
    start = data.draw(st.integers(0, 8 - count))
    left = rows[:start] + rows[start + count :]
    found = faults(left, head_of(rows))
    assert found
    if start + count < 8:
        assert found[0][0] == start + 1
        assert "gone" in found[0][1]
    else:
        assert any("gone from the end" in what for _, what in found)


@given(st.integers(0, 7), st.integers(0, 7))
def test_rows_that_changed_places_are_found(one: int, other: int) -> None:
    rows = sealed(8)
    moved = [*rows]
    moved[one], moved[other] = rows[other], rows[one]
    assert bool(faults(moved, head_of(rows))) == (one != other)


@given(st.integers(0, 7), st.integers(0, 7))
def test_rows_that_changed_places_and_numbers_are_named(one: int, other: int) -> None:
    rows = sealed(8, batch=100)
    moved = [*rows]
    if one == other or 7 in (one, other):
        return
    moved[one] = msgspec.structs.replace(rows[other], seq=one + 1)
    moved[other] = msgspec.structs.replace(rows[one], seq=other + 1)
    assert {one + 1, other + 1} <= {seq for seq, _ in faults(moved, head_of(rows))}


def test_a_chain_that_was_computed_anew_is_not_signed() -> None:
    """Who can write to the database can make all hashes fit, and cannot sign."""
    rows = sealed(7)
    digest, rewritten = rows[2].hash, rows[:3]
    for row in rows[3:]:
        forged = msgspec.structs.replace(row, sub="mallory")
        digest = row_hash(digest, forged)
        rewritten.append(msgspec.structs.replace(forged, hash=digest))
    head = AuditHead("acme", 7, digest, rows[-1].checkpoint or "")
    found = faults(rewritten, head)
    assert [seq for seq, _ in found] == [6, 7, 0]
    assert "the rows from 4 to 6 were rewritten" in found[0][1]


def test_a_checkpoint_by_another_key_or_of_another_tenant_or_place_is_no_checkpoint() -> None:
    rows = sealed(3, key=OTHER)
    assert "root_unknown" in faults(rows, head_of(rows))[0][1]
    rows = sealed(3)
    foreign = sign_checkpoint(ROOT, "other", 3, rows[-1].hash, NOW)
    assert faults(rows, AuditHead("acme", 3, rows[-1].hash, foreign))[0][0] == 0
    earlier = sign_checkpoint(ROOT, "acme", 2, rows[1].hash, NOW)
    assert faults(rows, AuditHead("acme", 3, rows[-1].hash, earlier))[0][0] == 0
    assert faults(rows, AuditHead("acme", 3, rows[-1].hash, ""))[0][0] == 0


def test_another_tenants_rows_are_not_ones_own() -> None:
    rows = sealed(3, tenant="other")
    found = faults(rows, AuditHead("acme"))
    assert any("another tenant" in what for _, what in found)


def test_a_cut_end_shows_by_its_head() -> None:
    rows = sealed(6)
    assert faults(rows[:4], head_of(rows))[0] == (0, "rows 5 to 6 are gone from the end")
    # Together with the head it shows only by an earlier export: that is said in the documentation.
    assert faults(rows[:3], head_of(rows[:3])) == []


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_no_text_is_taken_for_a_checkpoint(text: bytes | str) -> None:
    with pytest.raises(CapabilityError):
        verify_checkpoint(text if isinstance(text, str) else text.decode("latin-1"), ROOTS)


def test_no_other_token_of_the_root_is_taken_for_a_checkpoint() -> None:
    clock = SystemClock()
    token = RootMinter(ROOT, clock, Uuid7Generator(clock)).mint_access(
        Principal("a", "b", "c"), "coder", "coder:execute"
    )
    with pytest.raises(CapabilityError) as caught:
        verify_checkpoint(token, ROOTS)
    assert caught.value.reason == "type_wrong"


def test_faults_are_bounded() -> None:
    rows = [msgspec.structs.replace(row, sub="mallory") for row in sealed(400, batch=500)]
    check = AuditChainVerifier("acme", ROOTS)
    for row in rows:
        check.check_row(row)
    assert len(check.faults) == 100
