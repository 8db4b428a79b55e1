"""The public door as a client reaches it: one or several addresses, retries within a deadline, failures as types."""

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
    DeadlineExceeded,
    DoorError,
    ServerError,
    Unavailable,
    error_of_answer,
    error_of_transport,
)
from octollm.clock import Clock, Ids
from octollm.errors import OctoError, SettingError
from octollm.resilience import Deadline, Failure, RetryPolicy
from octollm.rpc.http import Answer, Http, Streamed, TransportError
from octollm.rpc.http1 import Http1
from octollm.rpc.kept import Kept, key_of

T = TypeVar("T")

ANSWER_SECONDS = 30.0
UPLOAD_SECONDS = 120.0
SHED = frozenset({"overloaded", "draining", "rate_limited"})
"""Refusals that come before anything is done, so that repeating is safe whatever was asked for."""
MAX_REFUSAL = 64 * 1024
_KEY = re.compile(r"[!-~]{1,512}")


class Door:
    """Sends requests to the door at one of ``urls``, showing ``key`` if there is one.

    The first address that answers is kept; when it is gone, the next one is tried. ``seconds`` is how long a call
    may take with all its retries, unless it says otherwise. ``tls`` is what ``https`` addresses are asked with, in
    place of what the system believes.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None,
        *,
        clock: Clock,
        ids: Ids,
        seconds: float = ANSWER_SECONDS,
        retry: RetryPolicy | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._urls = tuple(check_url(url) for url in urls)
        if not self._urls:
            raise SettingError("At least one URL of a public door is needed.")
        if key is not None and not _KEY.fullmatch(key):
            raise SettingError("An API key has 1 to 512 printable characters and no spaces.")
        self._key = key
        self._current = 0
        self._seconds = seconds
        self._retry = retry or RetryPolicy(attempts=4)
        self.clock = clock
        self.ids = ids
        self.tls = tls
        self._http = Http1(tls)
        self._kept = Kept()

    def __repr__(self) -> str:
        return f"Door({', '.join(self._urls)})"

    @property
    def url(self) -> str:
        """Return the address that is used now."""
        return self._urls[self._current]

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that open the door."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    @property
    def http(self) -> Http:
        """Return what sends the requests."""
        return self._http

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    def leave(self, url: str) -> None:
        """Go on to the address after ``url``, which is gone. Of calls that notice at the same time, the first moves."""
        if url == self.url:
            self._current = (self._current + 1) % len(self._urls)

    async def get(self, path: str, kind: type[T]) -> T:
        """Return what is at ``path``. Raises :class:`DoorError`, as all methods here do."""
        return self.decoded(await self.send("GET", path), kind)

    async def post(self, path: str, body: object, kind: type[T], *, key: str | None = None) -> T:
        """Send ``body`` (``None``: nothing) and return the answer. ``key`` is its ``Idempotency-Key``."""
        encoded = b"" if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        return self.decoded(await self.send("POST", path, encoded, headers, key=key), kind)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
        *,
        key: str | None = None,
        accepted: frozenset[int] = frozenset(),
    ) -> Answer:
        """Send a request; a status of 400 or more that is not ``accepted`` is raised.

        A request that may have begun is repeated only when it is a GET or carries a ``key``, so that nothing is done
        twice; one that surely did not begin is repeated in any case.
        """
        deadline = Deadline.after(self.clock, self._seconds if seconds is None else seconds)
        sent = {**self.headers, **(headers or {}), **({"Idempotency-Key": key} if key else {})}
        tried = 0
        while True:
            tried += 1
            try:
                return await self._once(method, path, body, sent, deadline, accepted)
            except DoorError as error:
                delay = self._delay(error, tried, deadline, repeats_safely=method == "GET" or key is not None)
                if delay is None:
                    raise
                await asyncio.sleep(delay)

    async def _once(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        deadline: Deadline,
        accepted: frozenset[int],
    ) -> Answer:
        url = self.url
        headers = {**headers, "X-Timeout-Ms": deadline.header()}
        key = key_of(path, "") if method == "GET" else None
        kept = None if key is None else self._kept.asking(key, headers)
        try:
            answer = await self._http.send(method, url + path, headers, body, seconds=deadline.left())
        except OctoError as error:
            self.leave(url)
            raise _unanswered(error, url) from error
        if key is not None:
            answer = self._kept.told(key, kept, answer)
        if answer.status < 400 or answer.status in accepted:
            return answer
        refusal = error_of_answer(answer)
        if isinstance(refusal, Unavailable):
            self.leave(url)
        raise refusal

    def _delay(self, error: DoorError, tried: int, deadline: Deadline, *, repeats_safely: bool) -> float | None:
        """Return the seconds until the next try; ``None`` for no more."""
        began = error.began and error.code not in SHED
        if isinstance(error, Unavailable) and not began and tried < len(self._urls):
            # Another address has not been asked yet: it need not wait.
            return 0.0 if deadline.left() > 0 else None
        return self._retry.wait(
            Failure(error.retryable, began, error.retry_after),
            tried=max(1, tried - len(self._urls) + 1),
            repeats_safely=repeats_safely,
            left=deadline.left(),
            random=random.random(),  # noqa: S311  jitter is no secret
        )

    @contextlib.asynccontextmanager
    async def stream(self, path: str, accept: str, seconds: float) -> AsyncGenerator[Streamed]:
        """Get ``path`` and hand its answer over as it comes, for at most ``seconds``; it is tried once.

        Raises :class:`DoorError`; a connection that breaks is ``retryable``, and the next try goes to the next address.
        """
        url = self.url
        try:
            headers = {**self.headers, "Accept": accept}
            async with self._http.stream("GET", url + path, headers, None, seconds=seconds) as streamed:
                if streamed.status >= 400:
                    raise error_of_answer(Answer(streamed.status, streamed.headers, await _refusal(streamed)))
                yield streamed
        except DoorError:
            raise
        except OctoError as error:
            self.leave(url)
            raise _unanswered(error, url) from error

    def decoded(self, answer: Answer, kind: type[T]) -> T:
        """Read an answer. Raises :class:`ServerError` (``peer_protocol``) for one in another form."""
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise not_understood(self.url) from error


def check_url(url: str) -> str:
    """Return the address of a door without a slash at its end. Raises ``setting_invalid``."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SettingError("The URL of a public door must be like http://localhost:8000 or https://octo.example.")
    if parts.username is not None or parts.password is not None:
        raise SettingError("The URL of a public door holds no name or password: give the API key as api_key.")
    return url.rstrip("/")


def not_understood(url: str) -> DoorError:
    """Return what to say of an answer in a form that is not ours."""
    return ServerError(
        f"What answers at {url} is not an OctoLLM of this version. Is another program on that port?",
        code="peer_protocol",
    )


def _unanswered(error: OctoError, url: str) -> DoorError:
    if isinstance(error, TransportError):
        return error_of_transport(error, url)
    if error.code == "deadline_exceeded":
        return DeadlineExceeded(error.detail, code=error.code)
    return not_understood(url)


async def _refusal(streamed: Streamed) -> bytes:
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > MAX_REFUSAL:
            break
    return body
