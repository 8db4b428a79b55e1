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
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target

REFRESH_SECONDS = 60.0
AGAIN_SECONDS = 1.0
"""At most so often the directory is read for a name that is not in it: anybody can make one up."""


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
        await self.entries(fresh=service not in self._entries)
        entry = self._entries.get(service)
        if entry is None or not entry.jkts:
            raise OctoError(f"No service {service} is registered.", code="authority_missing")
        return min(entry.jkts)

    async def entries(self, *, fresh: bool = False) -> Mapping[str, DirectoryEntry]:
        """Return every registered service; ``fresh`` for one who lacks what the last reading had."""
        oldest = AGAIN_SECONDS if fresh else REFRESH_SECONDS
        if self._age() > oldest:
            async with self._lock:
                if self._age() > oldest:
                    await self._read()
        return self._entries

    def _age(self) -> float:
        return self._clock.monotonic() - self._fetched_at

    async def _read(self) -> None:
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
