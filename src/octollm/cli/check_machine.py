"""Checks of this machine: Python, the home, disk space, ports, the model and the sandbox."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from octollm import __version__
from octollm.cli.findings import CheckResult
from octollm.config import Settings, unknown_settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.installation.home import Home, check_private, find_running
from octollm.llm.cache import ModelCache
from octollm.llm.select import resolve_model
from octollm.rpc.hosting import listen

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
    from octollm.services.arms.executor.probe import select_sandbox  # noqa: PLC0415  brings in both sandboxes

    tools = settings.model_cache.parent / "tools"
    chosen = await select_sandbox(settings.sandbox, cache_dir=tools, fetch=False)
    if chosen.name == "wasi" and settings.sandbox == "auto":
        todo = "Install bubblewrap for speed and for SQL: sudo apt-get install bubblewrap"
        return [CheckResult("sandbox", "warning", "WebAssembly: bubblewrap does not work here", todo)]
    return [CheckResult("sandbox", "ok", f"{chosen.name}: a program ran in it")]
