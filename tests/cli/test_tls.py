"""A whole installation in mutual TLS: `octollm up`, and the command line as its client."""

from __future__ import annotations

import json

import httpx
import pytest
from command_line import GOAL
from scripts import CODE
from wires import certificates

pytestmark = pytest.mark.sandbox


@pytest.fixture
def tls_settings(command_line):
    """Put TLS into the place's settings, before anything starts there."""
    tls = certificates()
    command_line.settings |= {
        "OCTOLLM_TLS_CERT": str(tls.certificate),
        "OCTOLLM_TLS_KEY": str(tls.key),
        "OCTOLLM_TLS_CA": str(tls.ca),
        "OCTOLLM_MTLS": "on",
    }
    return command_line


async def test_a_goal_is_done_in_tls(tls_settings, up):
    ended = await tls_settings.run("run", GOAL, "--json")
    assert ended.code == 0, ended.err
    assert CODE in json.loads(ended.out)["output"]
    checked = await tls_settings.run("doctor")
    assert checked.code == 0, checked.out + checked.err
    # A browser shows no certificate: the gateway wants none. Every other service does.
    async with httpx.AsyncClient(verify=tls_settings.verify) as client:
        assert (await client.get(f"{tls_settings.gateway_url}/health")).status_code == 200
        with pytest.raises(httpx.HTTPError):
            await client.get(f"https://127.0.0.1:{8001 + tls_settings.shift}/health")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"OCTOLLM_TLS_KEY": ""}, "set both OCTOLLM_TLS_CERT and OCTOLLM_TLS_KEY"),
        ({"OCTOLLM_TLS_CA": "/nowhere.pem"}, "OCTOLLM_TLS_CA (/nowhere.pem)"),
        ({"OCTOLLM_TLS_CERT": "/nowhere.pem"}, "No such file"),
        ({"OCTOLLM_HTTP": "2"}, "deploy/haproxy.cfg"),
    ],
)
async def test_settings_that_do_not_fit_are_refused_with_what_to_do(tls_settings, change, words):
    tls_settings.settings |= change
    ended = await tls_settings.run("up")
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.err
