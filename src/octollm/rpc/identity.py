"""A service's own name and keys, and what it knows of the others': the directory signed by the root."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from octollm.capability import (
    Delegator,
    DirectoryEntry,
    PublicKey,
    SelfSigner,
    SigningKey,
    Verifier,
    verify_directory,
)
from octollm.clock import Clock, Ids
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target

REFRESH_SECONDS = 60.0
PLACED_SECONDS = 10.0
"""An arm of one's own comes and goes, so what is known of one is asked for again so soon."""


class DirectoryAnswer(msgspec.Struct, frozen=True):
    """``GET orchestrator/directory``: a ``dir+jwt``."""

    directory: str


class Directory:
    """Names to key thumbprints, fetched from the orchestrator, verified, and refreshed."""

    def __init__(self, caller: Caller, signer: SelfSigner, roots: Mapping[str, PublicKey], clock: Clock) -> None:
        self._caller = caller
        self._signer = signer
        self._roots = roots
        self._clock = clock
        self._entries: Mapping[str, DirectoryEntry] = {}
        self._fetched_at = -1e9
        self._lock = asyncio.Lock()

    async def thumbprint(self, service: str) -> str:
        """Return the thumbprint of a key of ``service``; raise ``authority_missing`` when it has none."""
        if self._is_old(service):
            await self._refresh(service)
        entry = self._entries.get(service)
        if entry is None or not entry.jkts:
            raise OctoError(f"No service {service} is registered.", code="authority_missing")
        return entry.jkts[0]

    def addresses(self, service: str) -> tuple[str, ...]:
        """Return where an arm of one's own answered when its key was last asked for; nothing for other services."""
        entry = self._entries.get(service)
        return entry.urls if entry is not None else ()

    def _is_old(self, service: str) -> bool:
        entry = self._entries.get(service)
        age = self._clock.monotonic() - self._fetched_at
        # Only arms of one's own have addresses here, or will have.
        known_by_setting = entry is not None and service in SERVICES
        return entry is None or age > (REFRESH_SECONDS if known_by_setting else PLACED_SECONDS)

    async def _refresh(self, service: str) -> None:
        async with self._lock:
            if self._clock.monotonic() - self._fetched_at < 1.0 or not self._is_old(service):
                return
            call = Outgoing(
                Target("orchestrator", "directory", "GET", "/directory", "safe"),
                self._signer.svc_token("orchestrator"),
                Deadline.after(self._clock, 10),
            )
            answer = await self._caller.answer(call, DirectoryAnswer)
            self._entries = verify_directory(answer.directory, self._roots, self._clock)
            self._fetched_at = self._clock.monotonic()


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a process the service ``name``."""

    name: str
    key: SigningKey
    roots: Mapping[str, PublicKey]
    clock: Clock
    ids: Ids

    def signer(self) -> SelfSigner:
        """Return what signs for the service itself."""
        return SelfSigner(self.key, self.name, self.clock, self.ids)

    def delegator(self) -> Delegator:
        """Return what mints narrower authority for calls made under a grant."""
        return Delegator(self.key, self.name, self.clock, self.ids)

    def verifier(self) -> Verifier:
        """Return what checks the authority that callers show."""
        return Verifier(self.name, self.roots, self.clock)
