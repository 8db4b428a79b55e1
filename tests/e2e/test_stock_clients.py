"""An arm called without a line of our client: by curl, by httpx and by a browser.

HTTP/2 is spoken by the proxy in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser_kit import browser
from gateway_client import GatewayClient
from proxy import HaProxy

pytestmark = pytest.mark.sandbox
CODE = "def add(a, b):\n    return a + b\n"


@pytest.fixture
async def token(gateway: GatewayClient) -> str:
    answer = await gateway.client.post("/token", json={"scope": "judge:validate", "aud": "judge"})
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


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
async def test_curl_and_httpx(gateway: GatewayClient, token: str, http2: bool) -> None:
    judge = gateway.system.urls["judge"]
    with proxy_of(judge) if http2 else contextlib.nullcontext(judge) as base:
        await _curl_and_httpx(base + "/validate", token, http2=http2)


@contextlib.contextmanager
def proxy_of(url: str) -> Iterator[str]:
    proxy = HaProxy(httpx.URL(url).port or 0)
    proxy.start()
    try:
        yield proxy.url
    finally:
        proxy.stop()


async def _curl_and_httpx(url: str, token: str, *, http2: bool) -> None:
    authorization = f"Authorization: Bearer {token}"
    call = (url, "--header", authorization, "--data", json.dumps({"code": CODE}))
    body, version = await curl(*call)
    assert (json.loads(body)["is_valid"], version) == (True, "1.1")
    lines, _ = await curl(*call, "--header", "Accept: application/x-ndjson")
    assert json.loads(lines.strip().splitlines()[-1])["result"]["is_valid"] is True
    if http2:
        body, version = await curl("--http2-prior-knowledge", *call)
        assert (json.loads(body)["is_valid"], version) == (True, "2")
    async with httpx.AsyncClient(http1=not http2, http2=http2) as client:
        answer = await client.post(url, json={"code": "def f(:"}, headers={"Authorization": f"Bearer {token}"})
    assert answer.json()["is_valid"] is False
    assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")


@pytest.mark.browser
async def test_a_browser(gateway: GatewayClient, token: str, tmp_path: Path) -> None:
    url = gateway.system.urls["judge"]
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
