"""The gateway behind the proxy of ``deploy/haproxy.cfg``: TLS and HTTP/2 for clients that know nothing of it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import h2.connection
import h2.events
import h2.settings
import httpx
import msgspec
import pytest
import websockets
from proxy import HaProxy
from scripts import SALES
from wires import certificates

from octollm.rpc.tls import client_context
from octollm.testing.fake_model import ScriptedModel
from octollm.testing.system import installation

pytestmark = pytest.mark.sandbox
GOAL = "How many rows have amount > 100, and their total?"


@dataclass
class ProxiedInstallation:
    """An installation behind a proxy, and an API key for it."""

    url: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def client(self, **headers: str) -> httpx.AsyncClient:
        """Return a client that speaks HTTP/2 only."""
        return httpx.AsyncClient(
            base_url=self.url, http1=False, http2=True, verify=trusted(), headers=headers, timeout=30, trust_env=False
        )


def trusted() -> ssl.SSLContext:
    return client_context(certificates().ca)


@pytest.fixture
async def proxied_installation(tmp_path: Path, model: ScriptedModel) -> AsyncGenerator[ProxiedInstallation]:
    tls = msgspec.structs.replace(certificates(), mutual=False)
    settings = {
        "OCTOLLM_MODEL": "openai:scripted",
        "OCTOLLM_MODEL_URL": model.url,
        "OCTOLLM_TLS_CERT": str(tls.certificate),
        "OCTOLLM_TLS_KEY": str(tls.key),
        "OCTOLLM_TLS_CA": str(tls.ca),
        "OCTOLLM_ALLOWED_HOSTS": "localhost",
    }
    async with installation(tmp_path / "home", environment=settings) as system:
        async with httpx.AsyncClient(base_url=system.gateway_url, verify=trusted(), trust_env=False) as local:
            made = await local.post("/keys", json={"name": "proxied", "scope": "user"})
        proxy = HaProxy(httpx.URL(system.gateway_url).port or 0, tls)
        proxy.start()
        try:
            yield ProxiedInstallation(f"https://localhost:{proxy.port}", made.json()["secret"])
        finally:
            proxy.stop()


async def test_a_task_is_run_and_watched(proxied_installation: ProxiedInstallation) -> None:
    files = [{"name": "sales.csv", "text": SALES}]
    async with proxied_installation.client(**proxied_installation.headers) as client:
        submitted = await client.post("/tasks", json={"goal": GOAL, "context": {"files": files}})
        assert (submitted.status_code, submitted.http_version) == (201, "HTTP/2")
        task_id = submitted.json()["task_id"]
        url = f"{proxied_installation.url.replace('https', 'wss')}/ws/tasks/{task_id}?after=0"
        async with (
            asyncio.timeout(60),
            websockets.connect(
                url, ssl=trusted(), additional_headers=proxied_installation.headers, proxy=None
            ) as socket,
        ):
            frames = [msgspec.json.decode(message) async for message in socket]
        assert (frames[-1]["type"], socket.close_code) == ("result", 1000)
        async with asyncio.timeout(60), client.stream("GET", f"/tasks/{task_id}/events?after=0") as stream:
            assert stream.http_version == "HTTP/2"
            lines = [line async for line in stream.aiter_lines()]
        same = [msgspec.json.decode(line[5:]) for line in lines if line.startswith("data:")]
        assert same[-1]["seq"] == frames[-1]["seq"]
        assert (await client.get(f"/tasks/{task_id}")).json()["status"] == "completed"


async def test_a_websocket_shares_the_connection_of_other_calls(proxied_installation: ProxiedInstallation) -> None:
    """Browsers do this where the server offers it: extended CONNECT, RFC 8441."""
    context = trusted()
    context.set_alpn_protocols(["h2"])
    port = httpx.URL(proxied_installation.url).port
    async with proxied_installation.client(**proxied_installation.headers) as client:
        submitted = await client.post("/tasks", json={"goal": GOAL, "context": {"files": []}})
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    writer.write(connection.data_to_send())
    received = b""
    status = ""
    async with asyncio.timeout(30):
        while b'"task_id"' not in received:
            for event in connection.receive_data(await reader.read(65536)):
                if isinstance(event, h2.events.RemoteSettingsChanged):
                    assert event.changed_settings[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL].new_value == 1
                    head = [
                        (":method", "CONNECT"),
                        (":protocol", "websocket"),
                        (":scheme", "https"),
                        (":authority", f"localhost:{port}"),
                        (":path", f"/ws/tasks/{submitted.json()['task_id']}?after=0"),
                        ("sec-websocket-version", "13"),
                        ("authorization", f"Bearer {proxied_installation.key}"),
                    ]
                    connection.send_headers(connection.get_next_available_stream_id(), head)
                elif isinstance(event, h2.events.ResponseReceived):
                    status = dict(event.headers)[b":status"].decode()
                elif isinstance(event, h2.events.DataReceived):
                    received += event.data or b""
            writer.write(connection.data_to_send())
    writer.close()
    assert status == "200"


async def test_a_client_of_the_proxy_is_not_the_local_user(proxied_installation: ProxiedInstallation) -> None:
    async with proxied_installation.client() as client:
        answer = await client.get("/tasks")
        assert (answer.status_code, answer.json()["code"]) == (401, "token_missing")
    async with proxied_installation.client(**proxied_installation.headers) as client:
        assert (await client.get("/tasks")).status_code == 200
        foreign = await client.get("/tasks", headers={"Host": "evil.example"})
        assert (foreign.status_code, foreign.json()["code"]) == (400, "host_refused")


async def test_the_cookie_of_a_session_stays_secure(proxied_installation: ProxiedInstallation) -> None:
    async with proxied_installation.client(Origin=proxied_installation.url) as page:
        opened = await page.post("/session", json={"api_key": proxied_installation.key})
        assert opened.status_code == 200, opened.text
        assert {"__Host-octollm_session"} == set(page.cookies)
        assert "; secure" in opened.headers["set-cookie"].lower()
        assert (await page.get("/session")).json()["session"] is True
