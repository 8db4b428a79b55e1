"""An arm called without a line of our client: by curl, by httpx and by a browser, over HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from browser_kit import browser
from whole import Door

pytestmark = pytest.mark.sandbox
CODE = "def add(a, b):\n    return a + b\n"


@pytest.fixture(params=["1.1", "2"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"OCTOLLM_HTTP": request.param}


@pytest.fixture
async def token(door: Door) -> str:
    answer = await door.client.post("/token", json={"scope": "judge:validate", "aud": "judge"})
    return answer.json()["access_token"]


async def curl(*arguments: str) -> tuple[str, str]:
    """Return what curl printed, and the version of HTTP that it spoke."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--show-error", "--max-time", "20", "--write-out", "\n%{http_version}", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    body, _, version = out.decode().rpartition("\n")
    return body, version


async def test_curl_and_httpx(door: Door, environment: dict[str, str], token: str) -> None:
    url = door.system.urls["judge"] + "/validate"
    authorization = f"Authorization: Bearer {token}"
    call = (url, "--header", authorization, "--data", json.dumps({"code": CODE}))
    body, version = await curl(*call)
    assert (json.loads(body)["is_valid"], version) == (True, "1.1")
    lines, _ = await curl(*call, "--header", "Accept: application/x-ndjson")
    assert json.loads(lines.strip().splitlines()[-1])["result"]["is_valid"] is True
    if environment["OCTOLLM_HTTP"] == "2":
        body, version = await curl("--http2-prior-knowledge", *call)
        assert (json.loads(body)["is_valid"], version) == (True, "2")
    prior = environment["OCTOLLM_HTTP"] == "2"
    async with httpx.AsyncClient(http1=not prior, http2=prior) as client:
        answer = await client.post(url, json={"code": "def f(:"}, headers={"Authorization": f"Bearer {token}"})
    assert answer.json()["is_valid"] is False
    assert answer.http_version == ("HTTP/2" if prior else "HTTP/1.1")


@pytest.mark.browser
async def test_a_browser(door: Door, token: str, tmp_path: Path) -> None:
    url = door.system.urls["judge"]
    async with browser(tmp_path / "profile") as tab:
        await tab.do("Page.navigate", url=url + "/docs")
        await tab.until("document.title === 'OctoLLM judge'", "the description is shown")
        assert not tab.errors
        # A page of the arm's own, without the policy that forbids the description to call anything.
        await tab.do("Page.navigate", url=url + "/health")
        await tab.until("document.body.innerText.includes('judge')", "the arm answers")
        body = json.dumps(json.dumps({"code": CODE}))
        headers = json.dumps({"Authorization": f"Bearer {token}"})
        found = await tab.run(
            f"fetch('/validate', {{method: 'POST', body: {body}, headers: {headers}}}).then(answer => answer.json())"
        )
    assert found["is_valid"] is True
