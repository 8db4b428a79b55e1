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
import typer
from rich.table import Table
from rich.text import Text

from octollm import __version__
from octollm.cli.output import messages, output
from octollm.cli.runtime import (
    EXIT_DONE,
    EXIT_FAILED,
    AsJson,
    async_command,
    command_settings,
    open_transport,
    print_json,
)
from octollm.client._transport import GatewayTransport
from octollm.clock import SystemClock
from octollm.config import Settings, unknown_settings
from octollm.contracts.observability import Readiness
from octollm.contracts.services import SERVICES, local_url
from octollm.errors import OctoError
from octollm.installation.home import Home, check_private, find_running
from octollm.llm.cache import ModelCache
from octollm.llm.selection import resolve_model
from octollm.masking import mask, mask_text
from octollm.rpc.transport import listen
from octollm.storage import open_database, open_redis
from octollm.storage.migrations import DatabaseService, database_url, require_schema

Level = Literal["ok", "warning", "broken"]

CHECK_TIMEOUT_SECONDS = 20.0
"""Timeout of one check: the first compilation of the WebAssembly sandbox takes longest."""
LOW_DISK_BYTES = 500 * 1024 * 1024
"""Less free space than this is a warning."""
MAX_CLOCK_SKEW_SECONDS = 5.0
"""Maximum difference to the gateway's clock: tokens tolerate little more."""
_SYMBOLS = {"ok": ("✓", "octo.good"), "warning": ("!", "octo.warn"), "broken": ("✗", "octo.bad")}

app = typer.Typer()


class CheckResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of one check. ``todo`` says how to repair it; empty when nothing has to be done."""

    check: str
    level: Level
    found: str
    todo: str = ""


@dataclass(frozen=True, slots=True)
class DiagnosticCheck:
    """A check by its name. ``run`` may return several results; an ``OctoError`` that it raises means ``broken``."""

    name: str
    run: Callable[[], Awaitable[Sequence[CheckResult]]]


@app.command(rich_help_panel="Installation")
@async_command
async def doctor(as_json: AsJson = False) -> int:
    """Check everything that an installation needs, and suggest fixes.

    It checks Python, the settings, the home, disk and ports, the model, the sandbox, Redis, and every service that
    runs. Each check ends within 20 seconds. The exit code is 1 when something is broken; warnings leave it 0.
    """
    settings = command_settings(warn=False)
    with messages().status("Checking"):
        results = await run_checks(build_checks(settings))
    if as_json:
        print_json(results)
    else:
        _print_results(results)
    return EXIT_FAILED if any(result.level == "broken" for result in results) else EXIT_DONE


def build_checks(settings: Settings) -> list[DiagnosticCheck]:
    """Return every check, in the order of the report."""
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


async def run_checks(checks: Sequence[DiagnosticCheck], *, timeout: float = CHECK_TIMEOUT_SECONDS) -> list[CheckResult]:
    """Run ``checks`` concurrently, each with ``timeout`` seconds; return their results in the order of ``checks``."""
    results = await asyncio.gather(*(_run_check(check, timeout) for check in checks))
    return [result for group in results for result in group]


async def _run_check(check: DiagnosticCheck, timeout: float) -> Sequence[CheckResult]:
    try:
        async with asyncio.timeout(timeout):
            return await check.run()
    except TimeoutError:
        return [CheckResult(check.name, "broken", f"no answer within {timeout:g} s", "Look at what it waits for.")]
    except OctoError as error:
        # The text of an error says what to do about it.
        return [CheckResult(check.name, "broken", str(mask(error.detail)))]


def _print_results(results: list[CheckResult]) -> None:
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for result in results:
        symbol, style = _SYMBOLS[result.level]
        text = Text(result.found)
        if result.todo:
            text.append(f"\n{result.todo}", "octo.warn")
        table.add_row(Text(symbol, style), Text(result.check, "octo.title"), text)
    console = output()
    console.print(table)
    broken = sum(result.level == "broken" for result in results)
    warnings = sum(result.level == "warning" for result in results)
    if broken or warnings:
        console.print(Text(f"{broken} broken, {warnings} to look at"))
    else:
        console.print(Text("All is well.", "octo.good"))


async def check_python() -> Sequence[CheckResult]:
    """Report the versions of Python and OctoLLM."""
    versions = f"OctoLLM {__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return [CheckResult("python", "ok", versions)]


async def check_settings() -> Sequence[CheckResult]:
    """Report unknown settings. Wrong values are refused before any check."""
    sentences = unknown_settings(os.environ, tuple(SERVICES))
    if not sentences:
        return [CheckResult("settings", "ok", "every OCTOLLM_* variable is known and right")]
    return [CheckResult("settings", "warning", sentence, "Correct the name or unset it.") for sentence in sentences]


async def check_home(settings: Settings) -> Sequence[CheckResult]:
    """Check that the home is writable and private, and report its user and free space."""
    return await asyncio.to_thread(_inspect_home, settings.home, await find_running(settings.home))


def _inspect_home(root: Path, running: object) -> Sequence[CheckResult]:
    home = Home(root)
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return [
            CheckResult("home", "broken", f"{existing} may not be written", "Set OCTOLLM_HOME to a folder of yours.")
        ]
    if home.keys.exists():
        check_private(home.keys)
        for path in home.keys.iterdir():
            check_private(path)
    use = "in use" if running else "free" if root.exists() else "not made yet: the first start does it"
    free = shutil.disk_usage(existing).free
    results = [CheckResult("home", "ok", f"{root}, {use}")]
    level = "warning" if free < LOW_DISK_BYTES else "ok"
    todo = "Make room: tasks, logs and files are kept there." if level == "warning" else ""
    results.append(CheckResult("disk", level, f"{free / 1e9:,.1f} GB free at {existing}", todo))
    return results


async def check_ports(settings: Settings) -> Sequence[CheckResult]:
    """Check that the services' ports are free, unless this home's installation holds them."""
    running = await find_running(settings.home)
    if running is not None:
        return [CheckResult("ports", "ok", f"held by this installation, process {running.pid}")]
    return await asyncio.to_thread(_probe_ports, settings.host, settings.port_offset)


def _probe_ports(host: str, shift: int) -> Sequence[CheckResult]:
    results: list[CheckResult] = []
    for name, info in SERVICES.items():
        try:
            listen(host, info.port + shift, name).close()
        except OctoError as error:
            results.append(CheckResult("ports", "warning", error.detail))
    first, last = (pick(info.port for info in SERVICES.values()) + shift for pick in (min, max))
    return results or [CheckResult("ports", "ok", f"free on {host}, from {first} to {last}")]


async def check_model(settings: Settings) -> Sequence[CheckResult]:
    """Check the model of the settings: the digest of an embedded one, or a provider's answer."""
    cache = ModelCache(settings.model_cache)
    choice = resolve_model(settings.model, settings.model_url, settings.model_api_key, cache)
    if choice.entry is None:
        return await _check_provider(settings, settings.model.partition(":")[2])
    if importlib.util.find_spec("xllamacpp") is None:
        return [CheckResult("model", "broken", "its runtime is not installed", "Run `pip install 'octollm[local]'`.")]
    path = await cache.verify(choice.entry)
    return [CheckResult("model", "ok", f"{choice.entry.title}, its digest is right: {path}")]


async def _check_provider(settings: Settings, name: str) -> Sequence[CheckResult]:
    """Fetch the provider's list of models, which costs nothing."""
    from octollm.llm.openai_compatible import OPENAI_URL, OpenAICompatibleModel  # noqa: PLC0415  only where one is used

    url = settings.model_url or OPENAI_URL
    provider = OpenAICompatibleModel(name, base_url=url, api_key=settings.model_api_key)
    try:
        models = await provider.list_models()
    finally:
        await provider.aclose()
    if models is None:
        return [CheckResult("model", "warning", f"{url} answers; it has no list of models to find {name} in")]
    if name not in models:
        return [CheckResult("model", "warning", f"{url} answers, and does not list {name}", "Look at OCTOLLM_MODEL.")]
    return [CheckResult("model", "ok", f"{name} at {url}")]


async def check_sandbox(settings: Settings) -> Sequence[CheckResult]:
    """Run a small program in the sandbox."""
    from octollm.services.arms.executor.selection import select_sandbox  # noqa: PLC0415  brings in both sandboxes

    tools = settings.model_cache.parent / "tools"
    sandbox = await select_sandbox(settings.sandbox, cache_dir=tools, fetch=False)
    if sandbox.name == "wasi" and settings.sandbox == "auto":
        todo = "Install bubblewrap for speed and for SQL: sudo apt-get install bubblewrap"
        return [CheckResult("sandbox", "warning", "WebAssembly: bubblewrap does not work here", todo)]
    return [CheckResult("sandbox", "ok", f"{sandbox.name}: a program ran in it")]


async def check_redis(settings: Settings) -> Sequence[CheckResult]:
    """Ping Redis and measure the round trip."""
    if settings.redis_url.startswith("memory://"):
        return [CheckResult("redis", "ok", "inside the process: other programs cannot subscribe to its events")]
    async with open_redis(settings.redis_url) as client:
        # The first ping opens the connection; only the second is measured.
        await client.ping()
        start = time.monotonic()
        await client.ping()
        milliseconds = (time.monotonic() - start) * 1000
    return [CheckResult("redis", "ok", f"{mask_text(settings.redis_url)} answers in {milliseconds:.1f} ms")]


async def check_database(settings: Settings) -> Sequence[CheckResult]:
    """Check that the database server answers and that its schemas are those of this version."""
    if settings.database_url is None:
        return [CheckResult("database", "ok", "SQLite files in the home")]
    url = mask_text(settings.database_url)
    failures: list[CheckResult] = []
    for service in get_args(DatabaseService):
        async with open_database(database_url(settings, service), clock=SystemClock()) as db:
            try:
                await require_schema(db, service)
            except OctoError as error:
                failures.append(CheckResult("database", "broken", error.detail, "octollm migrate"))
    return failures or [CheckResult("database", "ok", f"{url} answers, and its schemas are those of this version")]


async def check_services(settings: Settings) -> Sequence[CheckResult]:
    """Check the readiness of every service that should run, and the gateway's clock."""
    if not settings.urls and await find_running(settings.home) is None and not settings.service_urls:
        return [CheckResult("services", "ok", "none runs for this home; `octollm up` starts them")]
    async with open_transport(settings) as transport:
        results = await probe_services(settings, transport)
        return [*results, await _check_clock_skew(transport)]


async def probe_services(settings: Settings, transport: GatewayTransport) -> list[CheckResult]:
    """Check the readiness of every service that this machine can reach."""
    urls = _service_urls(settings, transport)
    return await asyncio.gather(*(_check_ready(transport, name, url) for name, url in urls.items()))


def _service_urls(settings: Settings, transport: GatewayTransport) -> dict[str, str]:
    """Return the URLs of the services that this machine can reach."""
    if settings.urls:
        # Of an installation elsewhere, only the gateway can be reached.
        return {"reflex": transport.url}
    tls = settings.tls_cert is not None
    own = {name: local_url(name, port_offset=settings.port_offset, tls=tls) for name in SERVICES}
    return {**own, **{name: urls[0] for name, urls in settings.service_urls.items()}, "reflex": transport.url}


async def _check_ready(transport: GatewayTransport, name: str, url: str) -> CheckResult:
    try:
        answer = await transport.http.send("GET", f"{url}/ready", {}, None, seconds=5)
        state = msgspec.json.decode(answer.body, type=Readiness)
    except OctoError as error:
        return CheckResult(name, "broken", error.detail, "Start it, or read its log for the reason why it ended.")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return CheckResult(name, "broken", f"the program at {url} is no OctoLLM", "Is another program on that port?")
    missing = [f"{key}: {part.detail}" for key, part in state.dependencies.items() if not part.ok]
    level = "ok" if state.status == "ready" else "warning" if answer.status == 200 else "broken"
    return CheckResult(name, level, "; ".join([state.status, *missing]))


async def _check_clock_skew(transport: GatewayTransport) -> CheckResult:
    answer = await transport.http.send("GET", f"{transport.url}/health", {}, None, seconds=5)
    date = answer.headers.get("date")
    if date is None:
        return CheckResult("clock", "warning", "the gateway sends no Date header")
    # The header has whole seconds (RFC 9110 section 6.6.1).
    skew = abs(parsedate_to_datetime(date).timestamp() - time.time())
    if skew > MAX_CLOCK_SKEW_SECONDS:
        return CheckResult(
            "clock", "broken", f"{skew:.0f} s apart from the gateway's", "Set both machines' clocks by NTP."
        )
    return CheckResult("clock", "ok", "as the gateway's")
