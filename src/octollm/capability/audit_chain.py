"""The audit log's hash chain: row hashes, checkpoints signed by a root key, and the verification of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from octollm.capability.errors import CapabilityError
from octollm.capability.jose import PublicKey, SigningKey, decode_jws, encode_jws, pinned_root
from octollm.capability.tokens import ROOT_ISSUER
from octollm.contracts.observability import AuditHead, AuditRow

MAX_CHECKPOINT_CHARS = 1_024
MAX_FAULTS = 100
"""Most faults that are reported."""


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``audit+jwt``: the chain of ``tenant`` stood at row ``seq`` with ``hash``, at ``iat`` (epoch seconds)."""

    iss: str
    tenant: str
    seq: int
    hash: str
    iat: float


@dataclass(frozen=True, slots=True)
class AuditChainError:
    """A fault at row ``seq``; 0 is the head."""

    seq: int
    what: str


def row_hash(previous: str, row: AuditRow) -> str:
    """Return the SHA-256, in hex, of ``row`` (without its own hash and checkpoint) after the hash ``previous``."""
    covered = [
        previous,
        row.seq,
        row.tenant,
        row.at,
        row.action,
        row.sub,
        row.cred,
        row.service,
        row.target,
        row.detail,
        row.request_id,
        row.correlation_id,
    ]
    return hashlib.sha256(msgspec.json.encode(covered, order="deterministic")).hexdigest()


def sign_checkpoint(key: SigningKey, tenant: str, seq: int, digest: str, now: float) -> str:
    """Return a checkpoint: the root's signature over the last row of a chain."""
    claims = Checkpoint(ROOT_ISSUER, tenant, seq, digest, round(now, 3))
    return encode_jws(msgspec.json.encode(claims), "audit+jwt", key, with_kid=True)


def verify_checkpoint(token: str, roots: Mapping[str, PublicKey]) -> Checkpoint:
    """Return the claims of a checkpoint that a root signed; raises ``CapabilityError`` for anything else."""
    if len(token) > MAX_CHECKPOINT_CHARS or not token.isascii():
        raise CapabilityError("bearer_malformed")
    jws = decode_jws(token, "audit+jwt")
    # The signature first: nothing that a checkpoint says counts before a root is known to have said it.
    jws.check_signature(pinned_root(jws.header, roots))
    try:
        claims = msgspec.convert(jws.claims, Checkpoint)
    except msgspec.ValidationError:
        raise CapabilityError("claims_malformed") from None
    if claims.iss != ROOT_ISSUER:
        raise CapabilityError("issuer_wrong")
    return claims


class AuditChainVerifier:
    """Verifies one tenant's rows in order. It collects the faults, each with its row, and goes on after one."""

    def __init__(self, tenant: str, roots: Mapping[str, PublicKey]) -> None:
        self._tenant = tenant
        self._roots = roots
        self._last = AuditHead(tenant)
        self._signed = 0
        self.faults: list[AuditChainError] = []
        self.rows = 0

    def check_cut(self, cut: AuditHead, *, archived: bool) -> None:
        """Check where a log begins whose rows up to ``cut`` are in the archive, and go on from there.

        ``archived`` says that these rows were to be checked before: they must end at the cut.
        """
        last = self._last
        if archived and last.seq < cut.seq:
            self._fault(last.seq + 1, f"rows {last.seq + 1} to {cut.seq} are not in the archive")
        elif archived and (last.seq, last.hash) != (cut.seq, cut.hash):
            self._fault(cut.seq, "the log was cut at another row than the archive has")
        self._check_signed(cut.seq, cut.hash, cut.checkpoint)
        self._last = cut

    def check_row(self, row: AuditRow) -> None:
        """Check the next row, which must follow the one before."""
        self.rows += 1
        expected = self._last.seq + 1
        if row.seq != expected:
            self._out_of_place(row, expected)
        elif row.tenant != self._tenant:
            self._fault(row.seq, f"it is of another tenant, {row.tenant[:64]!r}")
        elif row.hash != row_hash(self._last.hash, row):
            self._fault(row.seq, f"it was changed: {row.action} by {row.sub} does not have the hash that was sealed")
        # The stored hash goes on, not the computed one: a changed row is one fault, and not one of every later row.
        self._last = AuditHead(self._tenant, row.seq, row.hash)
        if row.checkpoint is not None:
            self._check_signed(row.seq, row.hash, row.checkpoint)

    def check_head(self, head: AuditHead) -> None:
        """Check that the rows end at ``head`` and that a root signed it."""
        if head.seq != self._last.seq:
            missing_rows = f"rows {self._last.seq + 1} to {head.seq} are gone from the end"
            self._fault(
                0,
                missing_rows if head.seq > self._last.seq else f"the chain ends at row {head.seq}, and there are more",
            )
        elif head.hash != self._last.hash:
            self._fault(0, "the head has another hash than the last row")
        if head.seq:
            self._check_signed(0, head.hash, head.checkpoint, at=head.seq)

    def _out_of_place(self, row: AuditRow, expected: int) -> None:
        if row.seq < expected:
            self._fault(row.seq, f"it stands where row {expected} belongs")
            return
        missing_rows = f"row {expected} is" if row.seq == expected + 1 else f"rows {expected} to {row.seq - 1} are"
        self._fault(expected, f"{missing_rows} gone")

    def _check_signed(self, seq: int, digest: str, token: str, *, at: int | None = None) -> None:
        place = seq if at is None else at
        try:
            signed = verify_checkpoint(token, self._roots)
        except CapabilityError as error:
            self._fault(seq, f"its checkpoint is not signed by a root key that is known here ({error.reason})")
            return
        if (signed.tenant, signed.seq) != (self._tenant, place):
            self._fault(seq, f"its checkpoint is of row {signed.seq} of tenant {signed.tenant[:64]!r}")
        elif signed.hash != digest:
            self._fault(
                seq, f"the rows from {self._signed + 1} to {place} were rewritten: the root signed another hash"
            )
        if at is None:
            self._signed = seq

    def _fault(self, seq: int, what: str) -> None:
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(AuditChainError(seq, what))
