"""A login by an OpenID Connect provider of somebody else's making, from its code flow to a task."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from browser_kit import browser
from ports import free_port
from scripts import default_reply

from octollm.testing import wait_until
from octollm.testing.fake_model import scripted_model
from octollm.testing.system import installation

pytestmark = pytest.mark.sandbox
GOAL = "Write a Python function double(number) with tests"
USERS = [
    {"sub": "ada", "email": "ada@example.org", "groups": ["staff"], "org": "acme"},
    {"sub": "eve", "groups": ["guests"], "org": "acme"},
    {"sub": "bob", "groups": ["staff"], "org": "globex"},
    {"sub": "mallory", "groups": ["staff"], "org": "local"},
]
BACK = "http://127.0.0.1:8000/"


@dataclass
class Provider:
    url: str

    async def login(self, sub: str, client_id: str = "octollm") -> str:
        """Return an ID token, as a browser would get its code and a client its token."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            asked = {
                "client_id": client_id,
                "redirect_uri": BACK,
                "response_type": "code",
                "scope": "openid email profile",
            }
            sent = await client.post("/oauth2/authorize", params=asked, data={"sub": sub})
            code = parse_qs(urlsplit(sent.headers["location"]).query)["code"][0]
            form = {"grant_type": "authorization_code", "code": code, "redirect_uri": BACK}
            told = await client.post("/oauth2/token", data=form, auth=(client_id, "any"))
            return told.json()["id_token"]


def configured(issuer: Provider, more: str) -> str:
    """Return a file that believes a provider, and grants its staff what users may do."""
    return f"""
[[issuer]]
url = "{issuer.url}"
audience = "octollm"
{more}
[[issuer.grant]]
claim = "groups"
value = "staff"
scope = "user"
"""


@contextlib.asynccontextmanager
async def provider() -> AsyncGenerator[Provider]:
    port = free_port()
    arguments = [word for user in USERS for word in ("--user-claims", json.dumps(user))]
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "oidc-provider-mock"), "--port", str(port), *arguments,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:

        async def answers_() -> bool:
            async with httpx.AsyncClient(trust_env=False) as client:
                with contextlib.suppress(httpx.HTTPError):
                    return (await client.get(f"{url}/.well-known/openid-configuration")).status_code == 200
            return False

        await wait_until(answers_, description="the provider answers", timeout=20, interval=0.1)
        yield Provider(url)
    finally:
        process.terminate()
        await process.wait()


async def test_a_login_does_what_its_claims_grant_in_its_own_tenant(tmp_path: Path) -> None:
    async with provider() as issuer, scripted_model(default_reply) as model:
        (tmp_path / "oidc.toml").write_text(configured(issuer, 'tenant_claim = "org"'))
        environment = {
            "OCTOLLM_MODEL": "openai:scripted",
            "OCTOLLM_MODEL_URL": model.url,
            "OCTOLLM_OIDC": str(tmp_path / "oidc.toml"),
        }
        async with (
            installation(tmp_path / "home", environment=environment) as system,
            httpx.AsyncClient(base_url=system.gateway_url, timeout=30, trust_env=False) as gateway,
        ):
            ada = {"Authorization": f"Bearer {await issuer.login('ada')}"}
            made = await gateway.post("/tasks", json={"goal": GOAL}, headers=ada)
            assert made.status_code == 201, made.text
            task_id = made.json()["task_id"]

            async def ended() -> bool:
                return (await gateway.get(f"/tasks/{task_id}", headers=ada)).json()["status"] == "completed"

            await wait_until(ended, description="the goal completes", timeout=60, interval=0.1)
            bob = {"Authorization": f"Bearer {await issuer.login('bob')}"}
            assert (await gateway.get("/tasks", headers=bob)).json()["tasks"] == []
            assert (await gateway.get(f"/tasks/{task_id}", headers=bob)).status_code == 404

            for sub, code in (("eve", "login_refused"), ("mallory", "login_refused")):
                told = await gateway.get("/tasks", headers={"Authorization": f"Bearer {await issuer.login(sub)}"})
                assert told.json()["code"] == code, sub
            other = await issuer.login("ada", client_id="another-client")
            told = await gateway.get("/tasks", headers={"Authorization": f"Bearer {other}"})
            assert (told.status_code, told.json()["code"]) == (401, "api_key_invalid")

            # A session is opened for a login as for a key.
            origin = {"Origin": system.gateway_url}
            opened = await gateway.post("/session", json={"api_key": await issuer.login("ada")}, headers=origin)
            assert (opened.status_code, opened.json()["tenant"]) == (200, "acme")
            assert len((await gateway.get("/tasks")).json()["tasks"]) == 1
            gateway.cookies.clear()

            # It is listed as a key of its tenant, and revoked as one, by that tenant's administrator.
            secret = (await gateway.post("/keys", json={"name": "first", "scope": "admin", "tenant": "acme"})).json()[
                "secret"
            ]
            acme = {"Authorization": f"Bearer {secret}"}
            [login] = [
                key
                for key in (await gateway.get("/keys", headers=acme)).json()["keys"]
                if key["id"].startswith("oidc-")
            ]
            assert (login["name"], login["scope"]) == ("ada@example.org", "user")
            assert (await gateway.delete(f"/keys/{login['id']}", headers=acme)).status_code == 200
            again = {"Authorization": f"Bearer {await issuer.login('ada')}"}
            assert (await gateway.get("/tasks", headers=again)).status_code == 401
            assert (await gateway.get("/tasks", headers=ada)).status_code == 401


@pytest.mark.browser
async def test_the_page_logs_in_at_the_issuer_and_keeps_nothing(tmp_path: Path) -> None:
    async with provider() as issuer, scripted_model(default_reply) as model, browser(tmp_path / "profile") as tab:
        (tmp_path / "secret").write_text("our secret there")
        (tmp_path / "secret").chmod(0o600)
        secret = f'tenant = "acme"\nclient_secret_file = "{tmp_path / "secret"}"'
        (tmp_path / "oidc.toml").write_text(configured(issuer, secret))
        environment = {
            "OCTOLLM_MODEL": "openai:scripted",
            "OCTOLLM_MODEL_URL": model.url,
            "OCTOLLM_OIDC": str(tmp_path / "oidc.toml"),
            "OCTOLLM_TRUST_LOOPBACK": "off",
        }
        async with installation(tmp_path / "home", environment=environment) as system:
            await tab.do("Page.navigate", url=system.gateway_url + "/")
            offered = "[...document.querySelectorAll('form button')].find((b) => b.innerText.startsWith('Log in with'))"
            await tab.until(offered, "the issuer is offered")
            await tab.run(f"{offered}.click()")
            await tab.until(f"location.href.startsWith('{issuer.url}')", "the browser is at the issuer")
            sent = parse_qs(urlsplit(await tab.run("location.href")).query)
            assert sent["code_challenge_method"] == ["S256"]
            assert sent["redirect_uri"] == [system.gateway_url + "/"]
            login = "const f = document.createElement('form'); f.method = 'post';"
            login += "f.innerHTML = '<input name=sub value=ada>'; document.body.append(f); f.submit()"
            await tab.run(login)
            await tab.until(
                "document.querySelector('header.top > button')?.innerText === 'Log out'", "one is logged in"
            )
            assert await tab.run("location.search") == "", "the code is not left in the address"
            kept = await tab.run("document.cookie + JSON.stringify(sessionStorage) + JSON.stringify(localStorage)")
            assert kept == "{}{}"
            who = await tab.run("fetch('/session').then((a) => a.json())")
            assert (who["tenant"], who["session"]) == ("acme", True)
            # A login that this tab did not begin is not completed.
            await tab.do("Page.navigate", url=system.gateway_url + "/?code=stolen&state=forged")
            await tab.until("document.querySelector('.notice')?.innerText.includes('not completed')", "it is refused")
            assert await tab.run("location.search") == ""
