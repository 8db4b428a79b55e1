"""The HTTP transport of both clients: failover between addresses, retries within a deadline, errors as types."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from octollm.client.errors import (
    APIError,
    DeadlineExceeded,
    ServerError,
    Unavailable,
    error_from_response,
    error_from_transport,
)
from octollm.clock import Clock, IdGenerator
from octollm.errors import OctoError, SettingError
from octollm.resilience import CallFailure, Deadline, RetryPolicy
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import ETagCache, HttpClient, HttpResponse, StreamedResponse, TransportError, cache_key

T = TypeVar("T")

DEFAULT_TIMEOUT_SECONDS = 30.0
TRANSFER_TIMEOUT_SECONDS = 120.0
LOAD_SHEDDING_CODES = frozenset({"overloaded", "draining", "rate_limited"})
"""Refusals that come before anything is done, so that repeating is safe whatever was asked for."""
MAX_ERROR_BODY = 64 * 1024
_API_KEY = re.compile(r"[!-~]{1,512}")


class GatewayTransport:
    """Sends requests to the door at one of ``urls``, showing ``key`` if there is one.

    The first address that answers is kept; when it is gone, the next one is tried. ``seconds`` is how long a call
    may take with all its retries, unless it says otherwise. ``tls`` is what ``https`` addresses are asked with, in
    place of what the system believes.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None,
        *,
        clock: Clock,
        ids: IdGenerator,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._urls = tuple(validate_url(url) for url in urls)
        if not self._urls:
            raise SettingError("At least one URL of a public door is needed.")
        if api_key is not None and not _API_KEY.fullmatch(api_key):
            raise SettingError("An API key has 1 to 512 printable characters and no spaces.")
        self._api_key = api_key
        self._current = 0
        self._timeout = timeout
        self._retry = retry or RetryPolicy(max_attempts=4)
        self.clock = clock
        self.ids = ids
        self.tls = tls
        self._http = Http1Client(tls)
        self._etag_cache = ETagCache()

    def __repr__(self) -> str:
        return f"Door({', '.join(self._urls)})"

    @property
    def url(self) -> str:
        """Return the address that is used now."""
        return self._urls[self._current]

    @property
    def auth_headers(self) -> dict[str, str]:
        """Return the headers that open the door."""
        return {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}

    @property
    def http(self) -> HttpClient:
        """Return what sends the requests."""
        return self._http

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    def fail_over(self, url: str) -> None:
        """Go on to the address after ``url``, which is gone. Of calls that notice at the same time, the first moves."""
        if url == self.url:
            self._current = (self._current + 1) % len(self._urls)

    async def get(self, path: str, kind: type[T]) -> T:
        """Return what is at ``path``. Raises :class:`APIError`, as all methods here do."""
        return self.decode(await self.send("GET", path), kind)

    async def post(self, path: str, body: object, kind: type[T], *, idempotency_key: str | None = None) -> T:
        """Send ``body`` (``None``: nothing) and return the answer. ``key`` is its ``Idempotency-Key``."""
        encoded = b"" if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        return self.decode(await self.send("POST", path, encoded, headers, idempotency_key=idempotency_key), kind)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        *,
        idempotency_key: str | None = None,
        accepted_statuses: frozenset[int] = frozenset(),
    ) -> HttpResponse:
        """Send a request; a status of 400 or more that is not ``accepted`` is raised.

        A request that may have begun is repeated only when it is a GET or carries a ``key``, so that nothing is done
        twice; one that surely did not begin is repeated in any case.
        """
        deadline = Deadline.after(self.clock, self._timeout if timeout is None else timeout)
        sent = {
            **self.auth_headers,
            **(headers or {}),
            **({"Idempotency-Key": idempotency_key} if idempotency_key else {}),
        }
        tried = 0
        while True:
            tried += 1
            try:
                return await self._send_once(method, path, body, sent, deadline, accepted_statuses)
            except APIError as error:
                delay = self._retry_delay(
                    error, tried, deadline, repeats_safely=method == "GET" or idempotency_key is not None
                )
                if delay is None:
                    raise
                await asyncio.sleep(delay)

    async def _send_once(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        deadline: Deadline,
        accepted_statuses: frozenset[int],
    ) -> HttpResponse:
        url = self.url
        headers = {**headers, "X-Timeout-Ms": deadline.to_header()}
        key = cache_key(path, "") if method == "GET" else None
        kept = None if key is None else self._etag_cache.add_validator(key, headers)
        try:
            answer = await self._http.send(method, url + path, headers, body, seconds=deadline.remaining())
        except OctoError as error:
            self.fail_over(url)
            raise _translate_error(error, url) from error
        if key is not None:
            answer = self._etag_cache.store(key, kept, answer)
        if answer.status < 400 or answer.status in accepted_statuses:
            return answer
        refusal = error_from_response(answer)
        if isinstance(refusal, Unavailable):
            self.fail_over(url)
        raise refusal

    def _retry_delay(self, error: APIError, tried: int, deadline: Deadline, *, repeats_safely: bool) -> float | None:
        """Return the seconds until the next try; ``None`` for no more."""
        began = error.request_sent and error.code not in LOAD_SHEDDING_CODES
        if isinstance(error, Unavailable) and not began and tried < len(self._urls):
            # Another address has not been asked yet: it need not wait.
            return 0.0 if deadline.remaining() > 0 else None
        return self._retry.next_delay(
            CallFailure(error.retryable, began, error.retry_after),
            attempt=max(1, tried - len(self._urls) + 1),
            is_idempotent=repeats_safely,
            remaining=deadline.remaining(),
            random=random.random(),  # noqa: S311  jitter is no secret
        )

    @contextlib.asynccontextmanager
    async def stream(self, path: str, accept: str, timeout: float) -> AsyncGenerator[StreamedResponse]:
        """Get ``path`` and hand its answer over as it comes, for at most ``seconds``; it is tried once.

        Raises :class:`APIError`; a connection that breaks is ``retryable``, and the next try goes to the next address.
        """
        url = self.url
        try:
            headers = {**self.auth_headers, "Accept": accept}
            async with self._http.stream("GET", url + path, headers, None, seconds=timeout) as streamed:
                if streamed.status >= 400:
                    raise error_from_response(
                        HttpResponse(streamed.status, streamed.headers, await _read_error_body(streamed))
                    )
                yield streamed
        except APIError:
            raise
        except OctoError as error:
            self.fail_over(url)
            raise _translate_error(error, url) from error

    def decode(self, answer: HttpResponse, kind: type[T]) -> T:
        """Read an answer. Raises :class:`ServerError` (``peer_protocol``) for one in another form."""
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise protocol_error(self.url) from error


def validate_url(url: str) -> str:
    """Return the address of a door without a slash at its end. Raises ``setting_invalid``."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SettingError("The URL of a public door must be like http://localhost:8000 or https://octo.example.")
    if parts.username is not None or parts.password is not None:
        raise SettingError("The URL of a public door holds no name or password: give the API key as api_key.")
    return url.rstrip("/")


def protocol_error(url: str) -> APIError:
    """Return what to say of an answer in a form that is not ours."""
    return ServerError(
        f"What answers at {url} is not an OctoLLM of this version. Is another program on that port?",
        code="peer_protocol",
    )


def _translate_error(error: OctoError, url: str) -> APIError:
    if isinstance(error, TransportError):
        return error_from_transport(error, url)
    if error.code == "deadline_exceeded":
        return DeadlineExceeded(error.detail, code=error.code)
    return protocol_error(url)


async def _read_error_body(streamed: StreamedResponse) -> bytes:
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > MAX_ERROR_BODY:
            break
    return body
