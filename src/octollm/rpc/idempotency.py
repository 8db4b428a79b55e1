"""Idempotency keys: claim the key, run the handler, store its response; or replay the stored response.

A key is unique per tenant, subject, service, operation and key. A claim has a lease and a fencing token (``epoch``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from octollm.capability.keyring import SecretCipher
from octollm.contracts.problems import Problem, allows_new_attempt, to_problem
from octollm.errors import OctoError, RemoteError, RetryStep
from octollm.group_commit import GroupCommit
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall
from octollm.rpc.problems import PROBLEM_JSON
from octollm.rpc.responses import BufferedResponse

LEASE_SECONDS = 5.0
MAX_KEY = 200
RETENTION_SECONDS = 24 * 3600.0
MAX_STORED_BYTES = 1024 * 1024
"""Largest response that is stored: an idempotent call with a larger one runs again when it is repeated."""
NEVER_STORED = frozenset({401, 403, 408, 413, 429})
"""Client errors that do not come from the operation itself but from the credential, the size or the rate: a repeat may
succeed. Responses of 500 and more are not stored either."""


class IdempotencyKey(msgspec.Struct, frozen=True, order=True):
    """An idempotency key with everything that it is unique within."""

    tenant: str
    subject: str
    service: str
    operation: str
    key: str

    @classmethod
    def of(cls, call: IncomingCall) -> IdempotencyKey | None:
        """Return the key of a call that is being served; ``None`` for one without a key or without a capability.

        A service that calls under a grant has keys of its own in each task: it acts for the principal, but must not
        occupy or read what the principal or another service has a guessable key for.
        """
        verified, key = call.verified, call.key
        if key is None or verified is None:
            return None
        if verified.is_delegated:
            task = "" if verified.task is None else verified.task.task
            key = hashlib.sha256("\n".join((verified.issuer, task, key)).encode()).hexdigest()
        return cls(verified.tenant, verified.subject, call.service, call.operation, key)


@dataclass(frozen=True, slots=True)
class HeldClaim:
    """The caller holds the claim and runs the handler. ``epoch`` fences its completion."""

    epoch: int


class StoredResponse(msgspec.Struct, frozen=True):
    """The stored response of a call: status, body, and the headers that describe the body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class AlreadyCompleted:
    """The call was completed with this response."""

    response: StoredResponse


@dataclass(frozen=True, slots=True)
class InFlight:
    """Another holder runs the handler."""


@dataclass(frozen=True, slots=True)
class KeyConflict:
    """The key was used with another body."""


@dataclass(frozen=True, slots=True)
class OutcomeUnknown:
    """The holder of an ``at_most_once`` call vanished: the call may have taken effect."""


class NewClaim(msgspec.Struct, frozen=True):
    """A claim to make; ``task_id`` is set for work on a task, and ``epoch`` is the run of that task."""

    key: IdempotencyKey
    body_digest: str
    idempotent: bool
    task_id: str | None = None
    epoch: int | None = None


class ClaimCompletion(msgspec.Struct, frozen=True):
    """The response of a claimed call, to be stored."""

    key: IdempotencyKey
    epoch: int
    response: StoredResponse
    idempotent: bool = False


ClaimOutcome = HeldClaim | AlreadyCompleted | InFlight | KeyConflict | OutcomeUnknown


class IdempotencyStore(Protocol):
    """Storage of keys: the service's own SQL, or the orchestrator's."""

    async def claim(self, key: IdempotencyKey, body_digest: str, *, idempotent: bool, bearer: str) -> ClaimOutcome:
        """Claim the key, or return its state. ``bearer`` is the caller's authority."""
        ...

    async def renew(self, claims: Sequence[tuple[IdempotencyKey, int]]) -> None:
        """Renew the leases of claims, each a key and its epoch, for another 5 seconds."""
        ...

    async def complete(
        self, key: IdempotencyKey, epoch: int, response: StoredResponse, *, idempotent: bool = False
    ) -> None:
        """Store the response of a claimed call. That of an ``idempotent`` one need not wait for the disk."""
        ...

    async def release(self, key: IdempotencyKey, epoch: int) -> None:
        """Release a claim whose call did not run."""
        ...


def check_key(text: str | None) -> str | None:
    """Return a well-formed ``Idempotency-Key``; raise ``invalid_header`` for another."""
    if text is None:
        return None
    if not (0 < len(text) <= MAX_KEY and text.isascii() and text.isprintable()):
        raise OctoError(f"Idempotency-Key must be 1 to {MAX_KEY} printable ASCII characters.", code="invalid_header")
    return text


def body_digest(
    method: str, path: str, query: str, body: bytes, *, is_json: bool = False, document: Any = UNSET
) -> str:
    """Return the digest by which two requests with one key are recognized as the same call.

    JSON is digested in canonical form: a retry may space it or order its members differently. ``document`` is the body
    where it has been parsed already.
    """
    digest = hashlib.sha256(f"{method} {path}?{query}\n".encode())
    if document is not UNSET:
        digest.update(_encode_canonically(document))
    else:
        digest.update(canonical_json(body) if is_json else body)
    return digest.hexdigest()


def canonical_json(body: bytes) -> bytes:
    """Return JSON without spacing, with members sorted and strings in UTF-8; other bytes are returned unchanged.

    Numbers keep their type: ``1`` and ``1.0`` stay different, unlike in RFC 8785.
    """
    try:
        return _encode_canonically(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body


def _encode_canonically(document: object) -> bytes:
    return msgspec.json.encode(document, order="sorted")


class NestedKeys:
    """Derives the keys of nested calls, so that a retry of the parent call repeats them with the same keys.

    A key is SHA-256 over (parent key, service, operation, body digest, ordinal among equal calls).
    """

    def __init__(self, parent: str) -> None:
        self._parent = parent
        self._seen: dict[tuple[str, str, str], int] = {}

    def next(self, service: str, operation: str, body: bytes) -> str:
        """Return the key of the next call."""
        digest = hashlib.sha256(body).hexdigest()
        call = (service, operation, digest)
        ordinal = self._seen.get(call, 0)
        self._seen[call] = ordinal + 1
        text = "\n".join((self._parent, service, operation, digest, str(ordinal)))
        return hashlib.sha256(text.encode()).hexdigest()


I = TypeVar("I")  # noqa: E741  an item


class CancellableClaims(Generic[I]):
    """Waits for batched claims, and releases a claim whose caller was cancelled meanwhile."""

    def __init__(
        self, batches: GroupCommit[I, ClaimOutcome], release: Callable[[IdempotencyKey, int], Awaitable[None]]
    ) -> None:
        self._batches = batches
        self._release = release
        self._releasing: set[asyncio.Task[None]] = set()

    async def claim(self, item: I, key: IdempotencyKey) -> ClaimOutcome:
        """Return the outcome of ``item``, a claim of ``key``."""
        outcome = self._batches.put(item)
        try:
            # The shield lets the claim end: a claim without a caller has to be known to be released.
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            outcome.add_done_callback(partial(self._release_claimed, key))
            raise

    async def claim_many(self, items: Sequence[tuple[I, IdempotencyKey]]) -> list[ClaimOutcome | OctoError]:
        """Return the outcomes of several claims, in their order; an error is returned in the place of its claim."""
        outcomes: list[asyncio.Future[ClaimOutcome]] = []
        try:
            for item, _ in items:
                outcomes.append(self._batches.put(item))
            if outcomes:
                # Unlike gather, wait leaves the claims alone when it is cancelled, so that they can be released.
                await asyncio.wait(outcomes)
        except BaseException:
            for (_, key), outcome in zip(items, outcomes, strict=False):
                outcome.add_done_callback(partial(self._release_claimed, key))
            raise
        return [_outcome_of(outcome) for outcome in outcomes]

    def _release_claimed(self, key: IdempotencyKey, ended: asyncio.Future[ClaimOutcome]) -> None:
        if ended.cancelled() or ended.exception() is not None:
            return
        outcome = ended.result()
        if isinstance(outcome, HeldClaim):
            task = asyncio.create_task(self._release_quietly(key, outcome.epoch))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _release_quietly(self, key: IdempotencyKey, epoch: int) -> None:
        with contextlib.suppress(OctoError):  # unreleased, the claim ends with its lease
            await self._release(key, epoch)


def _outcome_of(ended: asyncio.Future[ClaimOutcome]) -> ClaimOutcome | OctoError:
    try:
        return ended.result()
    except OctoError as error:
        return error


REPLAYED = "Idempotent-Replayed"
MAX_POLL_SECONDS = 0.5
"""Longest pause in seconds between two polls of a key that another process holds; the first is a tenth of it."""
STORED_HEADERS = (b"content-type", b"location", b"etag", b"cache-control")
"""Headers that are stored with the body they describe."""
NOT_STARTED_CODES = frozenset(
    {"overloaded", "draining", "rate_limited", "connect_failed", "connect_timeout", "pool_timeout"}
)
"""Failures after which even an ``at_most_once`` call certainly had no effect."""


def may_have_taken_effect(error: OctoError) -> bool:
    """Return whether an ``at_most_once`` handler may have had its effect before it raised ``error``.

    Its caller must not try again under another key then. It may where the handler itself says that nothing was done:
    ``step_retry``, that it did not begin, or a refusal. The problem of a service that it called says nothing of that.
    """
    says_so = error.code == RetryStep.code or error.code in NOT_STARTED_CODES or _is_refusal(to_problem(error))
    if says_so and not isinstance(error, RemoteError):
        return False
    return error.code == "deadline_exceeded" or allows_new_attempt(error)


def _is_refusal(problem: Problem) -> bool:
    """Return whether a repeat of the call gets the same problem."""
    return 400 <= problem.status < 500 and problem.status not in NEVER_STORED


Work = Callable[[], Awaitable[BufferedResponse | Response]]


class ResponseCipher:
    """Encrypts responses that hold a secret, so that reading the store reveals none.

    The idempotency key is authenticated too: a ciphertext moved to another row does not decrypt.
    """

    def __init__(self, load_keys: Callable[[], Sequence[bytes]]) -> None:
        """``load_keys`` is as for :class:`~octollm.capability.keyring.SecretCipher`."""
        self._cipher = SecretCipher(load_keys)

    def encrypt(self, key: IdempotencyKey, response: StoredResponse) -> StoredResponse:
        """Return the response as it is stored."""
        return msgspec.structs.replace(response, body=self._cipher.encrypt(response.body, msgspec.json.encode(key)))

    def decrypt(self, key: IdempotencyKey, stored: StoredResponse) -> StoredResponse:
        """Return the response as it was. Raises ``outcome_unknown`` when no present key decrypts it."""
        body = self._cipher.decrypt(stored.body, msgspec.json.encode(key))
        if body is None:
            raise OctoError(
                "An earlier call with this key took effect, and its response can no longer be decrypted.",
                code="outcome_unknown",
            )
        return msgspec.structs.replace(stored, body=body)


class KeyedCall(msgspec.Struct, frozen=True):
    """A call and its key; ``digest`` is its :func:`body_digest`."""

    key: IdempotencyKey
    digest: str
    idempotent: bool
    bearer: str
    request_id: str
    cipher: ResponseCipher | None = None
    """Encrypts the stored response, where it holds a secret."""


class IdempotentHandler:
    """Runs the handlers of one service under idempotency keys."""

    def __init__(self, store: IdempotencyStore) -> None:
        self._store = store
        self._held: dict[IdempotencyKey, tuple[int, asyncio.Future[None]]] = {}
        """Claims held by this process: the epoch, and a future that completes with the call."""
        self._timer: asyncio.TimerHandle | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def run(self, call: KeyedCall, work: Work, deadline: Deadline) -> BufferedResponse | Response:
        """Run ``work`` once, or replay the response that it had before.

        Raises ``idempotency_conflict``, ``outcome_unknown``, ``deadline_exceeded``, and what ``work`` raises.
        """
        pause = MAX_POLL_SECONDS / 10
        while True:
            outcome = await self._store.claim(call.key, call.digest, idempotent=call.idempotent, bearer=call.bearer)
            if isinstance(outcome, HeldClaim):
                return await self._run_claimed(call, outcome.epoch, work)
            if isinstance(outcome, AlreadyCompleted):
                return _replay(_decrypt(call, outcome.response))
            if isinstance(outcome, KeyConflict):
                raise OctoError("This key was used with another body.", code="idempotency_conflict")
            if isinstance(outcome, OutcomeUnknown):
                raise OctoError(
                    "An earlier call with this key was cut off and may have taken effect.", code="outcome_unknown"
                )
            deadline.raise_if_passed()
            await self._wait(call.key, min(pause, deadline.remaining()))
            pause = min(2 * pause, MAX_POLL_SECONDS)

    async def _wait(self, key: IdempotencyKey, seconds: float) -> None:
        """Wait for the holder: for its future if that is this process, else for the next poll."""
        held = self._held.get(key)
        if held is None:
            await asyncio.sleep(seconds)
        else:
            # The future tells of the end of the call at once, so the next poll may come later.
            await asyncio.wait({held[1]}, timeout=seconds * 10)

    async def _run_claimed(self, call: KeyedCall, epoch: int, work: Work) -> BufferedResponse | Response:
        key = call.key
        claim = self._hold(key, epoch)
        try:
            response = await work()
        except OctoError as error:
            problem = to_problem(error, call.request_id)
            # A refusal by the operation itself is final: a repeat of the call gets the same one.
            if _is_refusal(problem):
                stored = StoredResponse(problem.status, msgspec.json.encode(problem), {"content-type": PROBLEM_JSON})
                await self._store.complete(key, epoch, stored, idempotent=call.idempotent)
            elif call.idempotent or error.code in NOT_STARTED_CODES:
                await self._release(key, epoch)
            raise
        except BaseException:
            # A cancelled call may have taken effect: an at-most-once claim stays, and its outcome becomes unknown.
            if call.idempotent:
                await self._release(key, epoch)
            raise
        else:
            stored = _stored_response(response)
            if call.cipher is not None:
                stored = call.cipher.encrypt(key, stored)
            # The store releases the claim of a response that is too large for it. An at-most-once call must not run
            # again, so its claim stays, and its outcome becomes unknown when the lease ends.
            if call.idempotent or len(stored.body) <= MAX_STORED_BYTES:
                await self._store.complete(key, epoch, stored, idempotent=call.idempotent)
            return response
        finally:
            # After an expired lease another call of this process may hold the key by now.
            if self._held.get(key) is claim:
                del self._held[key]
            claim[1].set_result(None)

    async def _release(self, key: IdempotencyKey, epoch: int) -> None:
        # A claim that cannot be released ends with its lease.
        with contextlib.suppress(OctoError):
            # A cancelled call releases its claim too, and its cancellation must not stop that.
            await asyncio.shield(self._store.release(key, epoch))

    def _hold(self, key: IdempotencyKey, epoch: int) -> tuple[int, asyncio.Future[None]]:
        loop = asyncio.get_running_loop()
        claim = self._held[key] = (epoch, loop.create_future())
        if self._timer is None:
            self._timer = loop.call_later(LEASE_SECONDS / 3, self._renew_soon)
        return claim

    def _renew_soon(self) -> None:
        """Renew all leases; one timer serves every call, since most end long before it fires."""
        self._timer = None
        if not self._held:
            return
        self._timer = asyncio.get_running_loop().call_later(LEASE_SECONDS / 3, self._renew_soon)
        # A slow store gets no second renewal on top of the first.
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew(), name="idempotency leases")

    async def _renew(self) -> None:
        # The lease is three intervals long: the next renewal makes up for a failed one.
        with contextlib.suppress(OctoError):
            await self._store.renew([(key, epoch) for key, (epoch, _) in self._held.items()])


def _stored_response(response: BufferedResponse | Response) -> StoredResponse:
    headers = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in response.raw_headers
        if name in STORED_HEADERS
    }
    return StoredResponse(response.status_code, bytes(response.body), headers)


def _decrypt(call: KeyedCall, stored: StoredResponse) -> StoredResponse:
    # Problems hold no secret and are stored as they are.
    return stored if call.cipher is None or stored.status >= 400 else call.cipher.decrypt(call.key, stored)


def _replay(stored: StoredResponse) -> BufferedResponse:
    default = "application/json" if stored.status < 400 else PROBLEM_JSON
    headers = {"content-type": default, "content-length": str(len(stored.body)), **stored.headers, REPLAYED: "true"}
    return BufferedResponse(
        stored.status,
        stored.body,
        [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
    )
