"""The gateway's rules that need no socket: names, paths, buckets, close codes, exchanges, the page's policy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from octollm.concurrency import run_until_first
from octollm.contracts.auth import TokenResponse
from octollm.contracts.problems import ERROR_KINDS
from octollm.errors import OctoError, RemoteError
from octollm.resilience import CallFailure, RetryPolicy
from octollm.services.reflex.guard import AllowedHosts, check_local_user, check_path, is_loopback
from octollm.services.reflex.page_assets import CSP, PageAssets, load_page
from octollm.services.reflex.throttle import get_address_bucket
from octollm.services.reflex.upstream import MAX_CACHED_TOKENS, GatewayRetryPolicy, TokenExchangeClient
from octollm.services.reflex.websocket import get_close_code
from octollm.testing import ManualClock

OURS = AllowedHosts(("octo.example", "named.example:8443"))
PATHS = st.text(st.sampled_from("/.%25eEfFcCaA0\\x? \x00é"), max_size=20).map(lambda text: "/" + text)


@given(PATHS)
def test_an_accepted_path_has_one_meaning(path: str) -> None:
    try:
        check_path(path.encode())
    except OctoError as error:
        assert error.code == "invalid_parameter"
        return
    decoded = unquote(path)
    assert unquote(decoded) == decoded
    assert decoded.count("/") == path.count("/")
    assert "//" not in decoded
    assert "\\" not in decoded
    assert not {".", ".."} & set(decoded.split("/"))
    assert all(character >= " " for character in decoded)


def test_ordinary_paths_are_accepted() -> None:
    for path in ("/", "/tasks", "/tasks/task-1.2_3~", "/.well-known/jwks.json", "/tasks/a%20b", "/ws/tasks/x"):
        check_path(path.encode())


@given(st.text(max_size=40), st.integers(1, 65535))
def test_no_text_but_our_names_is_ours(host: str, port: int) -> None:
    name = host.lower().rpartition(":")[0] or host.lower()
    if OURS.is_allowed_host(host, port):
        assert host.lower() in {"octo.example", "named.example"} or name in {
            "127.0.0.1",
            "localhost",
            "[::1]",
            "octo.example",
            "named.example",
        }


def test_a_name_with_a_port_is_ours_at_that_port_only() -> None:
    assert OURS.is_allowed_host("octo.example", 8000)
    assert OURS.is_allowed_host("octo.example:1", 8000)
    assert OURS.is_allowed_host("named.example:8443", 8000)
    assert not OURS.is_allowed_host("named.example", 8000)
    assert not OURS.is_allowed_host("localhost:8001", 8000)
    assert OURS.is_allowed_host("localhost", 80)
    assert OURS.is_own_origin("https://named.example:8443", 8000)
    assert OURS.is_own_origin("https://octo.example", 8000)
    assert not OURS.is_own_origin("ftp://octo.example", 8000)
    assert not OURS.is_own_origin("octo.example", 8000)
    assert not OURS.is_own_origin("http://user@octo.example", 8000)


@pytest.mark.parametrize("peer", ["10.0.0.1", "", "192.168.1.2", "::2", "1127.0.0.1", "::ffff:10.0.0.1", "localhost"])
def test_a_peer_elsewhere_is_not_local(peer: str) -> None:
    assert not is_loopback(peer)
    with pytest.raises(OctoError) as caught:
        check_local_user(Headers({"host": "localhost:8000"}), peer, 8000, OURS)
    assert caught.value.code == "token_missing"


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_a_peer_here_is_local(peer: str) -> None:
    check_local_user(Headers({"host": "localhost:8000", "sec-fetch-site": "none"}), peer, 8000, OURS)


def test_an_address_is_counted_as_what_one_client_can_have() -> None:
    assert get_address_bucket("10.0.0.1") != get_address_bucket("10.0.0.2")
    assert get_address_bucket("2001:db8::1") == get_address_bucket("2001:db8::ffff")
    assert get_address_bucket("2001:db8::1") != get_address_bucket("2001:db8:0:1::1")
    assert get_address_bucket("::ffff:10.0.0.1") == get_address_bucket("10.0.0.1")
    assert get_address_bucket("") == get_address_bucket("nonsense")


def test_every_error_has_a_close_code() -> None:
    codes = {code: get_close_code(OctoError("x", code=code)) for code in ERROR_KINDS}
    assert (codes["api_key_invalid"], codes["scope_missing"], codes["task_not_found"]) == (4401, 4403, 4404)
    assert (codes["rate_limited"], codes["unavailable"], codes["draining"]) == (1013, 1013, 1012)
    assert (codes["invalid_parameter"], codes["internal"]) == (1008, 1011)
    assert set(codes.values()) == {4401, 4403, 4404, 1008, 1011, 1012, 1013}


def test_long_waits_are_left_to_the_client() -> None:
    policy: RetryPolicy = GatewayRetryPolicy()

    def delay(retry_after: float | None) -> float | None:
        failure = CallFailure(retryable=True, may_have_started=False, retry_after=retry_after)
        return policy.next_delay(failure, attempt=1, is_idempotent=False, remaining=60, random=0.5)

    assert delay(None) is not None
    assert delay(1.0) == 1.0
    assert delay(1.1) is None


def test_the_page_is_small_and_its_version_is_that_of_every_file(tmp_path: Path) -> None:
    page = load_page()
    assert page.compressed_bytes <= 150_000
    for name, text in (("index.html", "<p>{version}"), ("app.js", "1")):
        (tmp_path / name).write_text(text)
    first = PageAssets(tmp_path).version
    (tmp_path / "app.js").write_text("2")
    assert PageAssets(tmp_path).version != first
    assert "unsafe" not in CSP


class FakeCaller:
    """Answers exchanges; ``gate`` holds them back."""

    def __init__(self) -> None:
        self.calls = 0
        self.expires_in = 300
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: RemoteError | None = None

    async def call(self, _call: object, _kind: object) -> TokenResponse:
        self.calls += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return TokenResponse(f"token-{self.calls}", self.expires_in, "user")


class FakeSigner:
    def sign_token(self, _audience: str) -> str:
        return "svc"


def exchange() -> tuple[TokenExchangeClient, Any, ManualClock]:
    caller: Any = FakeCaller()
    signer: Any = FakeSigner()
    clock = ManualClock()
    return TokenExchangeClient(caller, signer, clock), caller, clock


@pytest.mark.parametrize(("expires_in", "held"), [(300, 270), (40, 20), (100_000, 270)])
async def test_a_token_is_dropped_before_it_ends_and_after_five_minutes_at_most(expires_in: int, held: int) -> None:
    tokens, caller, clock = exchange()
    caller.expires_in = expires_in
    assert await tokens.get_token("key") == "token-1"
    clock.time += held - 1
    assert await tokens.get_token("key") == "token-1"
    clock.time += 2
    assert await tokens.get_token("key") == "token-2"


async def test_no_more_tokens_are_held_than_the_bound() -> None:
    tokens, caller, _clock = exchange()
    for number in range(MAX_CACHED_TOKENS + 1):
        await tokens.get_token(f"key-{number}")
    await tokens.get_token(f"key-{MAX_CACHED_TOKENS}")
    assert caller.calls == MAX_CACHED_TOKENS + 1
    await tokens.get_token("key-0")
    assert caller.calls == MAX_CACHED_TOKENS + 2


async def test_one_who_goes_away_does_not_take_the_others_answer() -> None:
    tokens, caller, _clock = exchange()
    caller.gate.clear()
    first = asyncio.create_task(tokens.get_token("key"))
    second = asyncio.create_task(tokens.get_token("key"))
    while not caller.calls:
        await asyncio.sleep(0)
    first.cancel()
    caller.gate.set()
    assert await second == "token-1"
    assert caller.calls == 1


async def test_a_refusal_is_asked_for_again() -> None:
    tokens, caller, _clock = exchange()
    caller.error = RemoteError("no", code="api_key_invalid", status=401, retryable=False)
    for _ in range(2):
        with pytest.raises(RemoteError):
            await tokens.get_token("key")
    caller.error = None
    assert await tokens.get_token("key") == "token-3"


async def test_closing_ends_what_is_under_way() -> None:
    tokens, caller, _clock = exchange()
    caller.gate.clear()
    asking = asyncio.create_task(tokens.get_token("key"))
    while not caller.calls:
        await asyncio.sleep(0)
    await tokens.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_of_several_works_the_first_to_end_ends_the_others() -> None:
    ended: list[str] = []

    async def never(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def soon() -> None:
        await asyncio.sleep(0)

    assert await run_until_first(never("a"), soon(), never("b")) == 1
    assert sorted(ended) == ["a", "b"]

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await run_until_first(never("c"), fails())
    assert ended[-1] == "c"
