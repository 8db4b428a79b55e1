"""A service that runs on hears of new root keys, and of those that are believed no more, from the directory."""

from __future__ import annotations

from kit import IDS
from wires import CURRENT

from octollm.capability import Principal, RootMinter, SigningKey
from octollm.capability.keyring import OVERLAP_SECONDS, TRUST_SECONDS, DatedKey, KeyRing, TrustedRoots
from octollm.clock import SystemClock
from octollm.contracts.auth import DirectoryResponse
from octollm.rpc import identity as identity_module
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import build_base, build_service
from octollm.rpc.transport import listen
from octollm.testing import wait_until


class ShiftedClock(SystemClock):
    ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


async def test_roots_come_and_go_while_a_service_runs(monkeypatch):
    monkeypatch.setattr(identity_module, "REFRESH_SECONDS", 0.05)
    clock = ShiftedClock()
    old, new = SigningKey.generate("root"), SigningKey.generate("root")
    ring = KeyRing([DatedKey(old), DatedKey(new, clock.now())])
    minter = RootMinter(ring, clock, IDS)
    told: list[set[str]] = []
    roots = TrustedRoots({old.thumbprint: old.public}, lambda now: told.append(set(now)))

    async def directory(_call: IncomingCall, _body: object) -> DirectoryResponse:
        return DirectoryResponse(minter.sign_directory({}))

    bound = listen("127.0.0.1", 0, "orchestrator")
    url = CURRENT.url(bound.getsockname()[1])
    async with CURRENT.client() as http:
        own = ServiceIdentity("orchestrator", SigningKey.generate("o"), {}, clock, IDS)
        base = build_base(own, http, StaticDiscovery({}), transport=CURRENT.wire, follow_revocations=False)
        operation = Operation("directory", "GET", "/directory", directory, auth="public")
        async with build_service(base, [operation]).serve(bound, shutdown_grace=0.1):
            service = build_base(
                ServiceIdentity("svc", SigningKey.generate("svc"), roots, clock, IDS),
                http,
                StaticDiscovery({"orchestrator": (url,)}),
                transport=CURRENT.wire,
                follow_revocations=False,
            )
            refreshing = service.directory.refresh_loop()
            refreshing.start()
            verifier = service.identity.verifier()
            alice = Principal("alice", "key-1", "acme")
            first = minter.mint_access(alice, "svc", "svc:work", 86_400)
            assert verifier.verify(first)
            await wait_until(
                lambda: set(roots) == {old.thumbprint, new.thumbprint}, description="the new root is known"
            )
            clock.ahead = OVERLAP_SECONDS + 1
            assert verifier.verify(minter.mint_access(alice, "svc", "svc:work")).links[0].iss == "orchestrator"
            assert verifier.verify(first), "nothing honest is refused in between"
            clock.ahead = OVERLAP_SECONDS + TRUST_SECONDS + 1
            await wait_until(lambda: set(roots) == {new.thumbprint}, description="the old root is forgotten")
            assert told == [{old.thumbprint, new.thumbprint}, {new.thumbprint}]
            await refreshing.aclose()
