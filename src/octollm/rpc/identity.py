"""A service's own name and keys, and what it knows of the others': the directory signed by the root."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from octollm.capability import Delegator, PublicKey, SelfSigner, SigningKey, Verifier, verify_directory
from octollm.clock import Clock, Ids
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target

REFRESH_SECONDS = 60.0


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
        self._entries: Mapping[str, frozenset[str]] = {}
        self._fetched_at = -1e9
        self._lock = asyncio.Lock()

    async def thumbprint(self, service: str) -> str:
        """Return the thumbprint of a key of ``service``; raise ``authority_missing`` when it has none."""
        if service not in self._entries or self._clock.monotonic() - self._fetched_at > REFRESH_SECONDS:
            await self._refresh(service)
        prints = self._entries.get(service)
        if not prints:
            raise OctoError(f"No service {service} is registered.", code="authority_missing")
        return min(prints)

    async def _refresh(self, service: str) -> None:
        async with self._lock:
            age = self._clock.monotonic() - self._fetched_at
            if age < 1.0 or (service in self._entries and age <= REFRESH_SECONDS):
                return
            call = Outgoing(
                Target("orchestrator", "directory", "GET", "/directory", "safe"),
                self._signer.svc_token("orchestrator"),
                Deadline.after(self._clock, 10),
            )
            answer = await self._caller.answer(call, DirectoryAnswer)
            entries = verify_directory(answer.directory, self._roots, self._clock)
            self._entries = {name: frozenset(entry.jkts) for name, entry in entries.items()}
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
