"""A service's identity: its name, its keys, and the directory of the other services.

The directory is signed by a root key. It maps names to key thumbprints and, for arms of one's own, to addresses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from octollm.capability import (
    Delegator,
    DirectoryEntry,
    PublicKey,
    Revocations,
    ServiceTokenSigner,
    SigningKey,
    Verifier,
    verify_directory,
)
from octollm.capability.keyring import KeyRing, TrustedRoots
from octollm.clock import Clock, IdGenerator
from octollm.concurrency import BackgroundLoop
from octollm.contracts.auth import DirectoryResponse
from octollm.contracts.internal_operations import READ_DIRECTORY
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient

REFRESH_SECONDS = 60.0
ARM_REFRESH_SECONDS = 10.0
"""Custom arms come and go, so their entries are refreshed more often."""
MIN_REFRESH_SECONDS = 1.0
"""Shortest time between two reads for an unknown name: anybody can make one up."""


class ServiceDirectory:
    """A verified copy of the orchestrator's directory, read again when it is older than its user accepts."""

    def __init__(self, client: ServiceClient, signer: ServiceTokenSigner, roots: TrustedRoots, clock: Clock) -> None:
        """``roots`` verify the directory, and follow it: it lists the root keys to trust from then on."""
        self._client = client
        self._signer = signer
        self._roots = roots
        self._clock = clock
        self._entries: Mapping[str, DirectoryEntry] = {}
        self._read_at = -1e9
        self._lock = asyncio.Lock()
        self._miss_lock = asyncio.Lock()

    async def thumbprint(self, service: str) -> str:
        """Return the thumbprint of the newest key of ``service``; raise ``authority_missing`` when it has none."""
        await self._read_if_older(self._max_age(service))
        entry = self._entries.get(service)
        if entry is None or not entry.jkts:
            raise OctoError(f"No service {service} is registered.", code="authority_missing")
        return entry.jkts[0]

    def addresses(self, service: str) -> tuple[str, ...]:
        """Return the addresses of a custom arm as last read; nothing for built-in services."""
        entry = self._entries.get(service)
        return entry.urls if entry is not None else ()

    async def entries(self, *, fresh: bool = False) -> Mapping[str, DirectoryEntry]:
        """Return every registered service; with ``fresh``, as registered now.

        Callers that come within ``MIN_REFRESH_SECONDS`` wait, and share a read.
        """
        if fresh:
            missed_at = self._clock.monotonic()
            async with self._miss_lock:
                if self._read_at <= missed_at:
                    await asyncio.sleep(min(self._read_at + MIN_REFRESH_SECONDS - missed_at, MIN_REFRESH_SECONDS))
                async with self._lock:
                    if self._read_at <= missed_at:
                        await self._read()
        else:
            await self._read_if_older(REFRESH_SECONDS)
        return self._entries

    def refresh_loop(self) -> BackgroundLoop:
        """Return the loop that reads the directory every minute, so that a service without calls follows the roots."""
        return BackgroundLoop(
            "directory refresh", lambda: self._read_if_older(REFRESH_SECONDS), interval=REFRESH_SECONDS, restart=True
        )

    def _max_age(self, service: str) -> float:
        """Return how old the copy may be for an entry of ``service``, in seconds."""
        if service not in self._entries:
            return MIN_REFRESH_SECONDS
        return REFRESH_SECONDS if service in SERVICES else ARM_REFRESH_SECONDS

    async def _read_if_older(self, max_age: float) -> None:
        if self._age() > max_age:
            # Callers that wait for the lock find the copy fresh: one read serves them all.
            async with self._lock:
                if self._age() > max_age:
                    await self._read()

    def _age(self) -> float:
        return self._clock.monotonic() - self._read_at

    async def _read(self) -> None:
        # Before the read: what is registered meanwhile may be missing from it.
        read_at = self._clock.monotonic()
        call = OutgoingCall(
            CallTarget.of(READ_DIRECTORY),
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, 10),
        )
        response = await self._client.call(call, DirectoryResponse)
        self._entries, roots = verify_directory(response.directory, self._roots, self._clock)
        self._roots.replace(roots)
        # Last, so that a directory that fails verification is read again at the next call.
        self._read_at = read_at


@dataclass(frozen=True, slots=True)
class ServiceIdentity:
    """The name, keys, trusted roots, clock and ids that make a process the service ``name``."""

    name: str
    key: SigningKey | KeyRing
    roots: Mapping[str, PublicKey]
    clock: Clock
    ids: IdGenerator

    def trusted_keys(self) -> dict[str, PublicKey]:
        """Return the service's own public keys that are trusted now, by thumbprint, the signing one first."""
        return KeyRing.of(self.key).trusted_keys(self.clock.now())

    def signer(self) -> ServiceTokenSigner:
        """Return the signer of this service's own tokens (``svc+jwt``)."""
        return ServiceTokenSigner(self.key, self.name, self.clock, self.ids)

    def delegator(self, revocations: Revocations | None = None) -> Delegator:
        """Return the minter of attenuated tokens for calls under a grant; it reuses none of ``revocations``."""
        return Delegator(self.key, self.name, self.clock, self.ids, revocations)

    def verifier(self, revocations: Revocations | None = None) -> Verifier:
        """Return the verifier of callers' bearer strings, which refuses ``revocations``."""
        return Verifier(self.name, self.roots, self.clock, revocations=revocations)
