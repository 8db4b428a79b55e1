"""The HTTP transport of both clients: failover between addresses, retries within a deadline, errors as types."""

from __future__ import annotations

import contextlib
import os
import random
import re
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import urlencode, urlsplit

import msgspec

from octollm.client.errors import (
    APIError,
    DeadlineExceeded,
    ServerError,
    Unavailable,
    error_from_response,
    error_from_transport,
    map_encoding_errors,
)
from octollm.clock import Clock, IdGenerator, SystemClock, Uuid7Generator
from octollm.concurrency import retry
from octollm.config import read_client_settings
from octollm.contracts.declarations import DeclaredOperation
from octollm.contracts.services import local_url
from octollm.errors import OctoError, SettingError, map_exceptions
from octollm.resilience import CallFailure, Deadline, RetryPolicy
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import ETagCache, HttpClient, HttpResponse, StreamedResponse, TransportError, cache_key
from octollm.rpc.tls import client_context

T = TypeVar("T")

DEFAULT_TIMEOUT_SECONDS = 30.0
TRANSFER_TIMEOUT_SECONDS = 120.0
"""Timeout of an upload or download."""
LOAD_SHEDDING_CODES = frozenset({"overloaded", "draining", "rate_limited"})
"""Refusals before a handler runs: the request may be repeated whatever its method."""
MAX_ERROR_BODY = 64 * 1024
"""Bytes of an error response that are read."""
_API_KEY = re.compile(r"[!-~]{1,512}")


class GatewayTransport:
    """Sends requests to the gateway at one of ``urls``, with ``api_key`` as the bearer token.

    The client stays with the first address that answers, and fails over to the next when that one is down. ``timeout``
    bounds a call with all its retries, in seconds. ``tls`` replaces the system's TLS configuration for ``https``.
    Raises ``setting_invalid`` for a malformed URL or key.
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
            raise SettingError("At least one URL of a gateway is needed.")
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
        return f"GatewayTransport({', '.join(self._urls)})"

    @property
    def url(self) -> str:
        """The address in use."""
        return self._urls[self._current]

    @property
    def auth_headers(self) -> dict[str, str]:
        """The headers that authenticate a request."""
        return {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}

    @property
    def http(self) -> HttpClient:
        """The HTTP client, for requests to other services than the gateway."""
        return self._http

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    def fail_over(self, url: str) -> None:
        """Use the address after ``url``, which is down."""
        # Of concurrent calls that notice the same failure, only the first moves on.
        if url == self.url:
            self._current = (self._current + 1) % len(self._urls)

    async def call(
        self,
        operation: DeclaredOperation[Any, T],
        body: object = None,
        *,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        **path_parameters: str,
    ) -> T:
        """Call a declared operation and return its response. Raises :class:`APIError`, as all methods here do.

        ``body`` is a message, or bytes for a file. Members of ``query`` that are ``None`` are left out. A request
        whose response was lost is repeated unless the operation is ``at_most_once``.
        """
        parameters = {name: value for name, value in (query or {}).items() if value is not None}
        with map_encoding_errors():
            path = operation.format_path(**path_parameters)
            if parameters:
                path = f"{path}?{urlencode(parameters)}"
            content = body if isinstance(body, bytes) else None if body is None else msgspec.json.encode(body)
        if operation.method in ("POST", "PUT"):
            content = content or b""
            headers = {"Content-Type": "application/json", **(headers or {})}
        # The key lets the server recognize a repeated request, so that repeating it does nothing twice.
        if idempotency_key is None and operation.kind == "idempotent":
            idempotency_key = self.ids.hex()
        response = await self.send(
            operation.method,
            path,
            content,
            headers,
            timeout,
            idempotency_key=idempotency_key,
            is_read_only=operation.kind == "read_only",
        )
        if operation.response is bytes:
            return cast("T", response.body)
        return self.decode(response, operation.response)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        *,
        idempotency_key: str | None = None,
        is_read_only: bool = False,
        accepted_statuses: frozenset[int] = frozenset(),
    ) -> HttpResponse:
        """Send a request; raise a status of 400 or more unless it is in ``accepted_statuses``.

        A request that may have reached a handler is repeated only when it reads, or carries an idempotency key. One
        that surely did not is repeated in any case.
        """
        deadline = Deadline.after(self.clock, self._timeout if timeout is None else timeout)
        request_headers = {
            **self.auth_headers,
            **(headers or {}),
            **({"Idempotency-Key": idempotency_key} if idempotency_key else {}),
        }
        is_idempotent = method == "GET" or is_read_only or idempotency_key is not None
        return await retry(
            lambda: self._send_once(method, path, body, request_headers, deadline, accepted_statuses),
            lambda error, attempt: self._retry_delay(error, attempt, deadline, is_idempotent=is_idempotent),
        )

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
        # A transport has one credential, and its addresses are of one installation: the path says enough.
        key = cache_key(path, "") if method == "GET" else None
        cached = None if key is None else self._etag_cache.add_validator(key, headers)
        try:
            response = await self._http.send(method, url + path, headers, body, seconds=deadline.remaining())
        except OctoError as failure:
            self.fail_over(url)
            raise _translate_error(failure, url) from failure
        if key is not None:
            response = self._etag_cache.store(key, cached, response)
        if response.status < 400 or response.status in accepted_statuses:
            return response
        error = error_from_response(response)
        if isinstance(error, Unavailable):
            self.fail_over(url)
        raise error

    def _retry_delay(self, error: OctoError, attempt: int, deadline: Deadline, *, is_idempotent: bool) -> float | None:
        """Return the seconds to wait before the next attempt; ``None`` to give up."""
        if not isinstance(error, APIError):
            return None
        may_have_started = error.request_sent and error.code not in LOAD_SHEDDING_CODES
        if isinstance(error, Unavailable) and not may_have_started and attempt < len(self._urls):
            # The next address may be up: try it without a pause.
            return 0.0 if deadline.remaining() > 0 else None
        return self._retry.next_delay(
            CallFailure(error.retryable, may_have_started, error.retry_after),
            # Attempts at further addresses do not count against the policy.
            attempt=max(1, attempt - len(self._urls) + 1),
            is_idempotent=is_idempotent,
            remaining=deadline.remaining(),
            random=random.random(),  # noqa: S311  jitter is no secret
        )

    @contextlib.asynccontextmanager
    async def stream(self, path: str, accept: str, timeout: float) -> AsyncGenerator[StreamedResponse]:
        """Stream the response to a GET of ``path`` for at most ``timeout`` seconds, in one attempt.

        Raises :class:`APIError`. A broken connection is ``retryable``; the next attempt goes to the next address.
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

    def decode(self, response: HttpResponse, kind: type[T]) -> T:
        """Decode a JSON response. Raises :class:`ServerError` (``peer_protocol``) for any other content."""
        with map_exceptions(protocol_error(self.url), msgspec.DecodeError, UnicodeDecodeError):
            return msgspec.json.decode(response.body, type=kind)


def create_transport(
    url: str | Sequence[str] | None,
    api_key: str | None,
    *,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    retry: RetryPolicy | None = None,
) -> GatewayTransport:
    """Build a transport; read what is ``None`` from the environment. See :func:`octollm.connect`."""
    settings = read_client_settings(os.environ)
    if url is None:
        local = local_url("reflex", port_offset=settings.port_offset, tls=settings.tls_cert is not None)
        urls: Sequence[str] = settings.urls or (local,)
    else:
        urls = [part.strip() for part in url.split(",") if part.strip()] if isinstance(url, str) else url
    tls = None
    # Only for an address that needs them: a wrong certificate setting must not stop a client of http.
    if any(address.startswith("https:") for address in urls):
        tls = client_context(settings.tls_ca, settings.tls_cert, settings.tls_key)
    clock = SystemClock()
    return GatewayTransport(
        urls,
        api_key or settings.api_key,
        clock=clock,
        ids=Uuid7Generator(clock),
        timeout=timeout,
        retry=retry,
        tls=tls,
    )


def validate_url(url: str) -> str:
    """Return the URL of a gateway without a trailing slash. Raises ``setting_invalid``."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SettingError("The URL of a gateway must have the form http://localhost:8000 or https://octo.example.")
    if parts.username is not None or parts.password is not None:
        raise SettingError("The URL of a gateway must not have a name or password: pass the API key as api_key.")
    return url.rstrip("/")


def protocol_error(url: str) -> APIError:
    """Return the error for a response that no OctoLLM of this version sends."""
    return ServerError(
        f"The server at {url} is not an OctoLLM of this version. Is another program on that port?",
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
