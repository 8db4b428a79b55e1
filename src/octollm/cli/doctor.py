"""`octollm doctor`: check everything that an installation needs, concurrently, each with a deadline."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import msgspec
from rich.table import Table
from rich.text import Text

from octollm import __version__
from octollm.cli.output import messages, output
from octollm.cli.runtime import EXIT_DONE, EXIT_FAILED, command_settings, open_transport, run_command
from octollm.client._transport import GatewayTransport
from octollm.clock import SystemClock
from octollm.config import Settings, unknown_settings
from octollm.contracts.observability import Readiness
from octollm.contracts.services import SERVICES, local_url
from octollm.errors import OctoError
from octollm.installation.home import Home, check_private, find_running
from octollm.llm.cache import ModelCache
from octollm.llm.selection import resolve_model
from octollm.rpc.transport import listen
from octollm.storage import open_database, open_redis
from octollm.storage.migrations import DatabaseService, database_url, require_schema
from octollm.telemetry import mask
from octollm.telemetry.masking import mask_text

_SYMBOLS = {"ok": ("✓", "octo.good"), "warning": ("!", "octo.warn"), "broken": ("✗", "octo.bad")}


def build_checks(settings: Settings) -> list[DiagnosticCheck]:
    """Return every check, in the order in which they are told."""
    return [
        DiagnosticCheck("python", check_python),
        DiagnosticCheck("settings", check_settings),
        DiagnosticCheck("home", partial(check_home, settings)),
        DiagnosticCheck("ports", partial(check_ports, settings)),
        DiagnosticCheck("model", partial(check_model, settings)),
        DiagnosticCheck("sandbox", partial(check_sandbox, settings)),
        DiagnosticCheck("redis", partial(check_redis, settings)),
        DiagnosticCheck("database", partial(check_database, settings)),
        DiagnosticCheck("services", partial(check_services, settings)),
    ]


def doctor_command(*, as_json: bool) -> int:
    """Print what every check found; exit code 1 when something is broken."""

    async def work() -> int:
        settings = command_settings(warn=False)
        with messages().status("Looking"):
            found = await run_checks(build_checks(settings))
        if as_json:
            print(msgspec.json.encode(found).decode())
        else:
            _print_results(found)
        return EXIT_FAILED if any(finding.level == "broken" for finding in found) else EXIT_DONE

    return run_command(work)


def _print_results(results: list[CheckResult]) -> None:
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in results:
        sign, style = _SYMBOLS[finding.level]
        said = Text(finding.found)
        if finding.todo:
            said.append(f"\n{finding.todo}", "octo.warn")
        table.add_row(Text(sign, style), Text(finding.check, "octo.title"), said)
    console = output()
    console.print(table)
    broken = sum(finding.level == "broken" for finding in results)
    warned = sum(finding.level == "warning" for finding in results)
    if broken or warned:
        console.print(Text(f"{broken} broken, {warned} to look at"))
    else:
        console.print(Text("All is well.", "octo.good"))


Level = Literal["ok", "warning", "broken"]

CHECK_TIMEOUT_SECONDS = 20.0
"""How long one check may take: compiling the WebAssembly sandbox for the first time is the longest."""


class CheckResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that was looked at. ``todo`` says what mends it; empty when nothing has to be done."""

    check: str
    level: Level
    found: str
    todo: str = ""


@dataclass(frozen=True, slots=True)
class DiagnosticCheck:
    """A check by its name. ``look`` may find several things, and raises ``OctoError`` for what is broken."""

    name: str
    run: Callable[[], Awaitable[Sequence[CheckResult]]]


async def run_checks(checks: Sequence[DiagnosticCheck], *, timeout: float = CHECK_TIMEOUT_SECONDS) -> list[CheckResult]:
    """Run ``checks`` side by side and return what they found, in their order. None outlasts ``seconds``."""
    found = await asyncio.gather(*(_run_check(check, timeout) for check in checks))
    return [finding for findings in found for finding in findings]


async def _run_check(check: DiagnosticCheck, timeout: float) -> Sequence[CheckResult]:
    try:
        async with asyncio.timeout(timeout):
            return await check.run()
    except TimeoutError:
        return [CheckResult(check.name, "broken", f"no answer within {timeout:g} s", "Look at what it waits for.")]
    except OctoError as error:
        # Every error says in its own words what to do.
        return [CheckResult(check.name, "broken", str(mask(error.detail)))]


LOW_DISK_BYTES = 500 * 1024 * 1024


async def check_python() -> Sequence[CheckResult]:
    """Tell which Python and which OctoLLM this is."""
    found = f"OctoLLM {__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return [CheckResult("python", "ok", found)]


async def check_settings() -> Sequence[CheckResult]:
    """Tell which settings nothing reads. Wrong ones are refused before any check."""
    sentences = unknown_settings(os.environ, tuple(SERVICES))
    if not sentences:
        return [CheckResult("settings", "ok", "every OCTOLLM_* variable is known and right")]
    return [CheckResult("settings", "warning", sentence, "Mend the name or unset it.") for sentence in sentences]


async def check_home(settings: Settings) -> Sequence[CheckResult]:
    """Look at the home: whether it may be used, who uses it, and what room it has."""
    return await asyncio.to_thread(_inspect_home, settings.home, await find_running(settings.home))


def _inspect_home(root: Path, running: object) -> Sequence[CheckResult]:
    place = Home(root)
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return [
            CheckResult("home", "broken", f"{existing} may not be written", "Set OCTOLLM_HOME to a folder of yours.")
        ]
    if place.keys.exists():
        check_private(place.keys)
        for path in place.keys.iterdir():
            check_private(path)
    used = "in use" if running else "free" if root.exists() else "not made yet: the first start does it"
    free = shutil.disk_usage(existing).free
    findings = [CheckResult("home", "ok", f"{root}, {used}")]
    level = "warning" if free < LOW_DISK_BYTES else "ok"
    todo = "Make room: tasks, logs and files are kept there." if level == "warning" else ""
    findings.append(CheckResult("disk", level, f"{free / 1e9:,.1f} GB free at {existing}", todo))
    return findings


async def check_ports(settings: Settings) -> Sequence[CheckResult]:
    """Look whether the services' ports are free, unless this home's installation holds them."""
    running = await find_running(settings.home)
    if running is not None:
        return [CheckResult("ports", "ok", f"held by this installation, process {running.pid}")]
    return await asyncio.to_thread(_probe_ports, settings.host, settings.port_offset)


def _probe_ports(host: str, shift: int) -> Sequence[CheckResult]:
    taken: list[CheckResult] = []
    for name, info in SERVICES.items():
        try:
            listen(host, info.port + shift, name).close()
        except OctoError as error:
            taken.append(CheckResult("ports", "warning", error.detail))
    first, last = (pick(info.port for info in SERVICES.values()) + shift for pick in (min, max))
    return taken or [CheckResult("ports", "ok", f"free on {host}, from {first} to {last}")]


async def check_model(settings: Settings) -> Sequence[CheckResult]:
    """Look at the model of the settings: an embedded one's file and digest, or a provider's address."""
    cache = ModelCache(settings.model_cache)
    choice = resolve_model(settings.model, settings.model_url, settings.model_api_key, cache)
    if choice.entry is None:
        return await _check_provider(settings, settings.model.partition(":")[2])
    if importlib.util.find_spec("xllamacpp") is None:
        return [CheckResult("model", "broken", "what runs it is not installed", "Run `pip install 'octollm[local]'`.")]
    path = await cache.verify(choice.entry)
    return [CheckResult("model", "ok", f"{choice.entry.title}, its digest is right: {path}")]


async def _check_provider(settings: Settings, name: str) -> Sequence[CheckResult]:
    """Ask the provider for its list of models, which costs nothing."""
    from octollm.llm.openai_compatible import OPENAI_URL, OpenAICompatibleModel  # noqa: PLC0415  only where one is used

    url = settings.model_url or OPENAI_URL
    provider = OpenAICompatibleModel(name, base_url=url, api_key=settings.model_api_key)
    try:
        served = await provider.list_models()
    finally:
        await provider.aclose()
    if served is None:
        return [CheckResult("model", "warning", f"{url} answers; it has no list of models to find {name} in")]
    if name not in served:
        return [CheckResult("model", "warning", f"{url} answers, and does not list {name}", "Look at OCTOLLM_MODEL.")]
    return [CheckResult("model", "ok", f"{name} at {url}")]


async def check_sandbox(settings: Settings) -> Sequence[CheckResult]:
    """Run a small program in the sandbox."""
    from octollm.services.arms.executor.selection import select_sandbox  # noqa: PLC0415  brings in both sandboxes

    tools = settings.model_cache.parent / "tools"
    chosen = await select_sandbox(settings.sandbox, cache_dir=tools, fetch=False)
    if chosen.name == "wasi" and settings.sandbox == "auto":
        todo = "Install bubblewrap for speed and for SQL: sudo apt-get install bubblewrap"
        return [CheckResult("sandbox", "warning", "WebAssembly: bubblewrap does not work here", todo)]
    return [CheckResult("sandbox", "ok", f"{chosen.name}: a program ran in it")]


MAX_CLOCK_SKEW_SECONDS = 5.0
"""How far the door's clock may be from this one: tokens tolerate little more."""


async def check_redis(settings: Settings) -> Sequence[CheckResult]:
    """Ask Redis whether it is there, and how fast it answers."""
    if settings.redis_url.startswith("memory://"):
        return [CheckResult("redis", "ok", "inside the process: other programs cannot subscribe to its events")]
    async with open_redis(settings.redis_url) as client:
        await client.ping()
        begun = time.monotonic()
        await client.ping()
        took = (time.monotonic() - begun) * 1000
    return [CheckResult("redis", "ok", f"{mask_text(settings.redis_url)} answers in {took:.1f} ms")]


async def check_database(settings: Settings) -> Sequence[CheckResult]:
    """Ask the database server whether it is there, and whether its schemas are those of this version."""
    if settings.database_url is None:
        return [CheckResult("database", "ok", "SQLite files in the home")]
    place = mask_text(settings.database_url)
    found: list[CheckResult] = []
    for service in get_args(DatabaseService):
        async with open_database(database_url(settings, service), clock=SystemClock()) as db:
            try:
                await require_schema(db, service)
            except OctoError as error:
                found.append(CheckResult("database", "broken", error.detail, "octollm migrate"))
    return found or [CheckResult("database", "ok", f"{place} answers, and its schemas are those of this version")]


async def check_services(settings: Settings) -> Sequence[CheckResult]:
    """Ask every service that should run whether it is ready, and for what it waits."""
    if not settings.urls and await find_running(settings.home) is None and not settings.service_urls:
        return [CheckResult("services", "ok", "none runs for this home; `octollm up` starts them")]
    async with open_transport(settings) as door:
        urls = _service_urls(settings, door)
        found = await asyncio.gather(*(_check_ready(door, name, url) for name, url in urls.items()))
        return [*found, await _check_clock_skew(door)]


def _service_urls(settings: Settings, transport: GatewayTransport) -> dict[str, str]:
    """Return where each service that this machine can reach should answer."""
    if settings.urls:
        # Behind a door that is elsewhere nothing else can be reached.
        return {"reflex": transport.url}
    tls = settings.tls_cert is not None
    own = {name: local_url(name, port_offset=settings.port_offset, tls=tls) for name in SERVICES}
    return {**own, **{name: urls[0] for name, urls in settings.service_urls.items()}, "reflex": transport.url}


async def _check_ready(transport: GatewayTransport, name: str, url: str) -> CheckResult:
    try:
        answer = await transport.http.send("GET", f"{url}/ready", {}, None, seconds=5)
        state = msgspec.json.decode(answer.body, type=Readiness)
    except OctoError as error:
        return CheckResult(name, "broken", error.detail, "Start it, or look into its log for why it ended.")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return CheckResult(name, "broken", f"what answers at {url} is no OctoLLM", "Is another program on that port?")
    lacking = [f"{key}: {part.detail}" for key, part in state.dependencies.items() if not part.ok]
    level = "ok" if state.status == "ready" else "warning" if answer.status == 200 else "broken"
    return CheckResult(name, level, "; ".join([state.status, *lacking]))


async def _check_clock_skew(transport: GatewayTransport) -> CheckResult:
    answer = await transport.http.send("GET", f"{transport.url}/health", {}, None, seconds=5)
    said = answer.headers.get("date")
    if said is None:
        return CheckResult("clock", "warning", "the door does not tell its time")
    # The header has whole seconds (RFC 9110 section 6.6.1).
    apart = abs(parsedate_to_datetime(said).timestamp() - time.time())
    if apart > MAX_CLOCK_SKEW_SECONDS:
        return CheckResult(
            "clock", "broken", f"{apart:.0f} s apart from the door's", "Set both machines' clocks by NTP."
        )
    return CheckResult("clock", "ok", "as the door's")
