"""An arm of your own in its own process: load it by name, enrol it once, serve it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from octollm.arm import Arm, open_arm
from octollm.capability import PublicKey, SigningKey
from octollm.capability.jose import to_jwks
from octollm.capability.keyring import TrustedRoots
from octollm.clock import Clock, IdGenerator
from octollm.config import Settings
from octollm.errors import ArmError, OctoError, SettingError
from octollm.installation.home import Home, open_keys, write_private
from octollm.installation.network import advertised_url, resolve_addresses, transport_from_settings
from octollm.installation.provisioning import read_key_ring, read_roots
from octollm.installation.service_host import ServiceHost, start_when_ready
from octollm.rpc.discovery import Discovery, DnsResolver, StaticDiscovery
from octollm.rpc.enrolment import enrol
from octollm.rpc.http_client import HttpClient
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import build_base
from octollm.rpc.transport import listen

FIRST_ARM_PORT = 8110
"""The first port after those of the built-in services: for an arm without OCTOLLM_PORT."""
MAX_ARM_PORTS = 20
UNKNOWN_KEY_CODES = frozenset({"token_invalid", "token_revoked", "token_malformed"})
"""Codes for an arm whose key is not, or no longer, known to the installation."""


def load_arm(target: str) -> Arm[Any]:
    """Import the arm ``module:name``; the current folder and its ``src`` are searched, too.

    Raises ``setting_invalid`` when the module or the arm in it does not exist.
    """
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise SettingError(f"{target!r} is not a built-in service; an arm has the form module:name, e.g. my_arm:arm.")
    here = Path.cwd()
    for folder in (str(here / "src"), str(here)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise SettingError(f"{module_name} needs {error.name}, which is not installed.") from error
        raise SettingError(f"There is no module {module_name} in {here} or among the installed packages.") from error
    arm = getattr(module, name, None)
    if not isinstance(arm, Arm):
        arms = ", ".join(key for key, value in vars(module).items() if isinstance(value, Arm)) or "none"
        raise SettingError(f"{name} in {module_name} is not an arm; the arms in it: {arms}.")
    return cast("Arm[Any]", arm)


def load_arms(targets: Sequence[str]) -> list[Arm[Any]]:
    """Return the arms that ``targets`` name.

    Raises ``setting_invalid`` for a target that is no arm, and ``arm_invalid`` for two arms with one name.
    """
    arms: dict[str, tuple[str, Arm[Any]]] = {}
    for target in targets:
        arm = load_arm(target)
        if arm.name in arms:
            raise ArmError(
                f"{arms[arm.name][0]} and {target} are both called {arm.name!r}. A name is for one arm: change one of"
                " the two."
            )
        arms[arm.name] = (target, arm)
    return [arm for _, arm in arms.values()]


class ArmKeyStore:
    """The key of an arm and the root keys that it pinned at its enrolment, in the home or in ``OCTOLLM_KEYS``."""

    def __init__(self, folder: Path, name: str, ids: IdGenerator) -> None:
        self._key_file = folder / f"{name}.jwk"
        self._roots_file = folder / f"{name}.roots.jwks"
        self._name = name
        self._ids = ids

    @property
    def is_enrolled(self) -> bool:
        """Whether the arm has enrolled at an installation."""
        return self._roots_file.exists()

    def load_key(self) -> SigningKey:
        """Return the arm's newest key; create it if missing. Raises ``setting_invalid`` for a damaged file."""
        if not self._key_file.exists():
            text = msgspec.json.encode(SigningKey.generate(self._name).to_jwk(private=True))
            write_private(self._key_file, text, self._ids)
        *_, newest = read_key_ring(self._key_file, self._name)
        return newest.key

    def load_roots(self) -> Mapping[str, PublicKey]:
        """Return the pinned root keys by thumbprint. Raises ``setting_invalid`` when there are none."""
        return {key.thumbprint: key for key, _created_at in read_roots(self._roots_file)}

    def pin_roots(self, roots: Mapping[str, PublicKey]) -> None:
        """Save the root keys for the next start."""
        write_private(self._roots_file, msgspec.json.encode(to_jwks(roots)), self._ids)


async def open_arm_keys(settings: Settings, name: str, ids: IdGenerator) -> ArmKeyStore:
    """Return the key store of the arm ``name``; create its folder if missing."""
    if settings.keys is not None:
        return ArmKeyStore(settings.keys, name, ids)
    async with open_keys(settings.home) as home:
        return ArmKeyStore(Home(home.root).keys, name, ids)


@contextlib.asynccontextmanager
async def serve_arm(
    arm: Arm[Any],
    settings: Settings,
    http: HttpClient,
    *,
    clock: Clock,
    ids: IdGenerator,
    on_wait: Callable[[str], None],
) -> AsyncGenerator[ServiceHost]:
    """Serve ``arm`` while the context is open; leaving it drains and deregisters the arm.

    At its first start the arm enrols with ``OCTOLLM_ENROLMENT_TOKEN`` and pins the root keys of the installation; later
    starts need no token. Raises ``setting_invalid`` when it has neither, what :func:`octollm.rpc.enrolment.enrol`
    raises, ``port_taken``, and ``unavailable`` when the orchestrator does not answer in time.
    """
    keys = await open_arm_keys(settings, arm.name, ids)
    port = settings.port or _first_free_port(settings)
    async with contextlib.AsyncExitStack() as stack:
        resolver = await stack.enter_async_context(DnsResolver())
        discovery = StaticDiscovery(resolve_addresses(settings), resolver)
        own = await asyncio.to_thread(keys.load_key)
        if not keys.is_enrolled:
            await _enrol(arm, own, keys, settings, http, discovery, clock, ids)

        async def start() -> ServiceHost:
            roots = TrustedRoots(keys.load_roots(), keys.pin_roots)
            identity = ServiceIdentity(arm.name, own, roots, clock, ids)
            base = build_base(
                identity,
                http,
                discovery,
                advertised_url=advertised_url(settings, port),
                trace_sample_ratio=settings.trace_sample_ratio,
                transport=transport_from_settings(settings),
            )

            return await start_when_ready(
                arm.name,
                lambda: open_arm(arm, base),
                (settings.host, port),
                drain=settings.shutdown_grace,
                checks={},
                # Opening an arm registers it.
                opening="orchestrator",
                clock=clock,
                timeout=settings.startup_timeout,
                on_wait=on_wait,
            )

        try:
            host = await start()
        except OctoError as error:
            if error.code not in UNKNOWN_KEY_CODES or settings.enrolment_token is None:
                raise
            # The arm was removed, or this is another installation than the one where it enrolled: enrol again.
            await _enrol(arm, own, keys, settings, http, discovery, clock, ids)
            host = await start()
        stack.push_async_callback(host.close, settings.shutdown_grace + 2)
        yield host


def _first_free_port(settings: Settings) -> int:
    """Return the first free port for an arm without a port of its own; raise ``port_taken`` when none of them is."""
    ports = range(FIRST_ARM_PORT + settings.port_offset, FIRST_ARM_PORT + settings.port_offset + MAX_ARM_PORTS)
    for port in ports[:-1]:
        with contextlib.suppress(OctoError):
            listen(settings.host, port, "arm").close()
            return port
    listen(settings.host, ports[-1], "arm").close()
    return ports[-1]


async def _enrol(
    arm: Arm[Any],
    own: SigningKey,
    keys: ArmKeyStore,
    settings: Settings,
    http: HttpClient,
    discovery: Discovery,
    clock: Clock,
    ids: IdGenerator,
) -> None:
    if settings.enrolment_token is None:
        scopes = " ".join(arm.declared_calls)
        calls = f' --calls "{scopes}"' if scopes else ""
        raise SettingError(
            f"{arm.name} has not enrolled at an installation yet. Let its administrator run `octollm keys enrol --name"
            f" {arm.name}{calls}` and start the arm once with OCTOLLM_ENROLMENT_TOKEN set to its output."
        )
    roots = await enrol(
        http,
        discovery,
        clock,
        ids,
        name=arm.name,
        key=own,
        enrolment_token=settings.enrolment_token,
        calls=arm.declared_calls,
        max_wait=settings.startup_timeout,
    )
    await asyncio.to_thread(keys.pin_roots, roots)
