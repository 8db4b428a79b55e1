"""Every shell and Python example of the README and the docs runs against a real installation.

A comment before an example says what it needs: `<!-- test: model -->` the embedded model, and
`<!-- test: skip, WHY -->` that it cannot be run here.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from ports import free_shift

from octollm.config import read_settings
from octollm.contracts.services import SERVICES
from octollm.installation.home import find_running
from octollm.llm.cache import ModelCache
from octollm.testing import wait_until

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TOLD_ELSEWHERE = {"arms.md"}
"""Pages whose blocks have a test of their own (test_docs_arms)."""
_BLOCK = re.compile(r"(?ms)(?:^<!-- test: (?P<mark>[^>]+) -->\n)?^```(?P<language>shell|python)\n(?P<code>.*?)^```")


@dataclass(frozen=True)
class Example:
    """One fenced block."""

    page: str
    line: int
    language: str
    mark: str
    code: str


def text_of(page: Path) -> str:
    """Return a page with its transcripts (four backticks) blanked out, line for line."""
    return re.sub(r"(?ms)^````.*?^````$", lambda match: "\n" * match[0].count("\n"), page.read_text())


def examples() -> list[Example]:
    found = []
    for page in PAGES:
        if page.name in TOLD_ELSEWHERE:
            continue
        text = text_of(page)
        for match in _BLOCK.finditer(text):
            line = text[: match.start("code")].count("\n") + 1
            name = str(page.relative_to(ROOT))
            found.append(Example(name, line, match["language"], match["mark"] or "", match["code"]))
    return found


def parameters():
    for example in examples():
        if example.mark.startswith("skip"):
            continue
        marks = [pytest.mark.model, pytest.mark.timeout(900)] if example.mark == "model" else []
        yield pytest.param(example, marks=marks, id=f"{example.page}:{example.line}")


def test_every_block_that_is_left_out_says_why():
    for example in examples():
        if example.mark.startswith("skip"):
            assert len(example.mark) > len("skip, because"), example
        else:
            assert example.mark in ("", "model"), example


def test_every_block_has_a_language_that_is_known():
    for page in PAGES:
        fences = re.findall(r"(?m)^```(\w*)$", text_of(page))
        assert set(fences[0::2]) <= {"shell", "python", "js", "json", "yaml", "text", "mermaid", "toml"}, page


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    """Run `octollm up` with a home of its own; yield what an example has to be given."""
    settings = read_settings(os.environ, tuple(SERVICES))
    if not ModelCache(settings.model_cache).available():
        if os.environ.get("CI"):
            pytest.fail("the embedded model is not in the cache: octollm models pull")
        pytest.skip("the embedded model is not in the cache: octollm models pull")
    home = tmp_path_factory.mktemp("home")
    shift = free_shift()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OCTOLLM_")}
    environment |= {
        "OCTOLLM_MODEL_CACHE": str(settings.model_cache),
        "OCTOLLM_HOME": str(home),
        "OCTOLLM_PORT_OFFSET": str(shift),
        "NO_COLOR": "1",
    }
    command = [sys.executable, "-c", "from octollm.cli import main; main()", "up"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            asyncio.run(until_ready(process, home, f"http://127.0.0.1:{8000 + shift}/ready"))
            yield environment, shift
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(10)


async def until_ready(process, home, url):
    async def ready():
        assert process.poll() is None, process.stdout.read().decode()
        # Another installation may have come first to these ports: it has to be this one that answers.
        running = await find_running(home)
        if running is None or running.pid != process.pid:
            return False
        async with httpx.AsyncClient(timeout=5) as client:
            try:
                return (await client.get(url)).status_code == 200
            except httpx.TransportError:
                return False

    await wait_until(ready, description=f"{url} answers 200", timeout=120, interval=0.1)


@pytest.mark.parametrize("example", list(parameters()))
def test_an_example_runs(example, installation, tmp_path):
    environment, shift = installation
    # The same addresses, moved to free ports; the same command, from this environment.
    code = re.sub(
        r"(localhost|127\.0\.0\.1):(8\d{3})", lambda match: f"{match[1]}:{int(match[2]) + shift}", example.code
    ).replace(".venv/bin/octollm", "octollm")
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", code] if example.language == "shell" else [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment, "PATH": path, "CHECKOUT": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "[not_accepted]" in done.stdout + done.stderr:
        # The example ran; that a small model's work was refused is the judge's good right, and not the text's fault.
        return
    assert done.returncode == 0, done.stdout + done.stderr
