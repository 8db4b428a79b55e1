"""``/client.js`` in a real browser: its example, and frames that come once over connections that break."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser_kit import Tab, browser
from client_kit import FILES, GOAL, SENTENCE, ClientKit, cutting

import octollm
from octollm.testing.fake_model import ScriptedReply

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/octollm/services/reflex/page"
pytestmark = pytest.mark.browser

COLLECT = """
window.frames_ = []; window.states = []; window.ended = null;
import("/client.js").then(async ({ watchTask }) => {
  const watch = watchTask(TASK, { after: 0 });
  watch.onstate = (state) => window.states.push(state);
  try {
    for await (const frame of watch) window.frames_.push(frame);
    window.ended = { position: watch.position };
  } catch (error) { window.ended = { code: error.code, reason: error.reason, text: String(error) }; }
});
"""


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    async with browser(tmp_path / "profile") as opened:
        yield opened


async def open_page(tab: Tab, url: str) -> None:
    """Open the gateway's page, whose policy allows its modules."""
    await tab.do("Page.navigate", url=url)
    await tab.until("location.port && document.readyState === 'complete'", "the page is loaded")


async def test_the_example_of_the_documentation_runs(kit: ClientKit, tab: Tab) -> None:
    [example] = re.findall(r"```js\n(.*?)```", (ROOT / "docs/dashboard.md").read_text(), re.DOTALL)
    script = re.sub(r"import (\{.*?\}) from (.*?);", r"const \1 = await import(\2);", example)
    await open_page(tab, kit.url)
    await tab.run("window.lines = []; console.log = (...parts) => window.lines.push(parts.join(' ')); undefined")
    await tab.run(f"(async () => {{ {script} }})().catch((error) => window.lines.push(String(error))); undefined")
    await tab.until("window.lines.includes('live')", "the stream is open")
    async with octollm.connect(kit.url) as octo:
        task = await octo.submit(GOAL, files=FILES)
        await task.result()
    await tab.until(f"window.lines.includes('{task.id} completed')", "the end of the task is seen")


async def test_a_task_comes_once_over_connections_that_break(kit: ClientKit, tmp_path: Path) -> None:
    kit.answer_with(ScriptedReply(SENTENCE + " 🐙" * 200, chunk_size=2))
    async with (
        cutting(kit.url, least=700, longest=2500, most=0) as proxy,
        octollm.connect(kit.url) as octo,
        browser(tmp_path / "profile") as tab,
    ):
        await open_page(tab, proxy.url)
        await tab.run('import("/client.js").then(() => { window.ready = true; }); undefined')
        await tab.until("window.ready", "the module is loaded")
        # From here on: what is cut is the stream.
        proxy.most = 30
        task = await octo.submit(GOAL, files=FILES)
        await tab.run(COLLECT.replace("TASK", f"'{task.id}'") + "undefined")
        await tab.until("window.ended", "the watch has ended", timeout=60)
        assert "code" not in await tab.run("window.ended"), await tab.run("window.ended")
        frames: list[dict[str, Any]] = await tab.run("window.frames_")
        states: list[str] = await tab.run("window.states")
        expected = [update async for update in task.updates()]
        assert proxy.cuts > 0
    seqs = [frame["seq"] for frame in frames if frame["type"] != "token"]
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) == sum(update.type != "token" for update in expected)
    assert states.count("reconnecting") >= 1
    assert states[-1] == "closed"
    ends = {frame["data"]["step"]: frame["data"]["text_length"] for frame in frames if "text_length" in frame["data"]}
    texts = _texts(frames)
    assert {step: len(texts.get(step, "")) for step in ends} == ends
    assert "🐙" in "".join(texts.values())


def _texts(frames: list[dict[str, Any]]) -> dict[str, str]:
    """Return the text of each step's latest attempt."""
    texts: dict[str, str] = {}
    for frame in frames:
        if frame["type"] == "token":
            before = "" if frame["reset"] else texts.get(frame["step"], "")
            assert frame["offset"] == len(before)
            texts[frame["step"]] = before + frame["data"]["text"]
    return texts


async def test_what_is_refused_for_good_ends_the_iteration(kit: ClientKit, tab: Tab) -> None:
    await open_page(tab, kit.url)
    await tab.run(COLLECT.replace("TASK", f"'task-{'0' * 32}'") + "undefined")
    await tab.until("window.ended", "the watch has ended")
    assert (await tab.run("window.ended"))["code"] == 4404


async def test_the_module_is_served_with_its_types(kit: ClientKit) -> None:
    async with httpx.AsyncClient(base_url=kit.url) as client:
        for name, media_type in (("client.js", "text/javascript"), ("client.d.ts", "text/plain")):
            response = await client.get(f"/{name}")
            assert response.headers["content-type"].startswith(media_type)
            assert response.text == (SOURCE / name).read_text()
            again = await client.get(f"/{name}", headers={"If-None-Match": response.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")


def test_the_types_name_what_the_module_exports() -> None:
    exported = re.findall(r"(?m)^export (?:class|function) (\w+)", (SOURCE / "client.js").read_text())
    declared = re.findall(r"(?m)^export (?:class|function) (\w+)", (SOURCE / "client.d.ts").read_text())
    assert sorted(exported) == sorted(declared)
