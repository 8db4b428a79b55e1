"""A service's name and keys, and the root-signed directory of the other services' key thumbprints and addresses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

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
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient

REFRESH_SECONDS = 60.0
ARM_REFRESH_SECONDS = 10.0
"""An arm of one's own comes and goes, so what is known of one is asked for again so soon."""
MIN_REFRESH_SECONDS = 1.0
"""At most so often the directory is read for a name that is not in it: anybody can make one up."""


class DirectoryResponse(msgspec.Struct, frozen=True):
    """``GET orchestrator/directory``: a ``dir+jwt``."""

    directory: str


class ServiceDirectory:
    """Names to key thumbprints, fetched from the orchestrator, verified, and refreshed."""

    def __init__(self, client: ServiceClient, signer: ServiceTokenSigner, roots: TrustedRoots, clock: Clock) -> None:
        """``roots`` are those that sign it; it says which are believed from then on."""
        self._client = client
        self._signer = signer
        self._roots = roots
        self._clock = clock
        self._entries: Mapping[str, DirectoryEntry] = {}
        self._fetched_at = -1e9
        self._lock = asyncio.Lock()

    async def thumbprint(self, service: str) -> str:
        """Return the thumbprint of a key of ``service``; raise ``authority_missing`` when it has none."""
        await self._read_if_older(self._max_age(service))
        entry = self._entries.get(service)
        if entry is None or not entry.jkts:
            raise OctoError(f"No service {service} is registered.", code="authority_missing")
        return entry.jkts[0]

    def addresses(self, service: str) -> tuple[str, ...]:
        """Return where an arm of one's own answered when its key was last asked for; nothing for other services."""
        entry = self._entries.get(service)
        return entry.urls if entry is not None else ()

    async def entries(self, *, fresh: bool = False) -> Mapping[str, DirectoryEntry]:
        """Return every registered service; ``fresh`` for one who lacks what the last reading had."""
        await self._read_if_older(MIN_REFRESH_SECONDS if fresh else REFRESH_SECONDS)
        return self._entries

    async def refresh_periodically(self) -> None:
        """Read it once a minute, for ever: also who never asks for a key has to know which roots are believed."""
        while True:
            with contextlib.suppress(OctoError):  # whoever needs an entry is told why there is none
                await self._read_if_older(REFRESH_SECONDS)
            await asyncio.sleep(REFRESH_SECONDS)

    def _max_age(self, service: str) -> float:
        """Return how old what is known of a service may be: only arms of one's own come and go."""
        if service not in self._entries:
            return MIN_REFRESH_SECONDS
        return REFRESH_SECONDS if service in SERVICES else ARM_REFRESH_SECONDS

    async def _read_if_older(self, max_age: float) -> None:
        if self._age() > max_age:
            async with self._lock:
                if self._age() > max_age:
                    await self._read()

    def _age(self) -> float:
        return self._clock.monotonic() - self._fetched_at

    async def _read(self) -> None:
        call = OutgoingCall(
            CallTarget("orchestrator", "directory", "GET", "/directory", "read_only"),
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, 10),
        )
        answer = await self._client.call(call, DirectoryResponse)
        self._entries, roots = verify_directory(answer.directory, self._roots, self._clock)
        self._roots.replace(roots)
        self._fetched_at = self._clock.monotonic()


@dataclass(frozen=True, slots=True)
class ServiceIdentity:
    """What makes a process the service ``name``."""

    name: str
    key: SigningKey | KeyRing
    roots: Mapping[str, PublicKey]
    clock: Clock
    ids: IdGenerator

    def trusted_keys(self) -> dict[str, PublicKey]:
        """Return the service's own public keys that are believed now, by thumbprint, the one that signs first."""
        return KeyRing.of(self.key).trusted_keys(self.clock.now())

    def signer(self) -> ServiceTokenSigner:
        """Return what signs for the service itself."""
        return ServiceTokenSigner(self.key, self.name, self.clock, self.ids)

    def delegator(self) -> Delegator:
        """Return what mints narrower authority for calls made under a grant."""
        return Delegator(self.key, self.name, self.clock, self.ids)

    def verifier(self, revocations: Revocations | None = None) -> Verifier:
        """Return what checks the authority that callers show, against ``revocations``."""
        return Verifier(self.name, self.roots, self.clock, revocations=revocations)
