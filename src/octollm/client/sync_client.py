"""Client: AsyncClient for synchronous code, on an event loop in a thread; connect() and connect_sync()."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from octollm.client._transport import DEFAULT_TIMEOUT_SECONDS, GatewayTransport
from octollm.client.async_client import AsyncClient
from octollm.client.task import AsyncTaskHandle
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import read_client_settings
from octollm.contracts.services import local_url
from octollm.errors import OctoError
from octollm.resilience import RetryPolicy
from octollm.rpc.tls import client_context

T = TypeVar("T")

_CANCEL_GRACE_SECONDS = 5.0
"""How long an interrupted call is given to close what it has open."""
_END = object()


class Portal:
    """Runs coroutines on its loop and waits for them. Threads may share it; :meth:`close` ends its thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._generators: set[AsyncGenerator[Any]] = set()
        # A program that forgets to close is not kept from ending.
        self._thread = threading.Thread(target=self._serve, name="octollm-client", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Say whether it was closed."""
        return not self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` and return what it returns. An exception here, as by Ctrl-C, cancels it and waits for its end.

        Raises ``state_conflict`` after :meth:`close`.
        """
        over = threading.Event()
        future = self._start(_run_and_signal(work, over))
        if future is None:
            work.close()
            raise _closed_error()
        try:
            return future.result()
        except CancelledError:
            raise _closed_error() from None
        except BaseException:
            if not future.done():
                future.cancel()
                over.wait(_CANCEL_GRACE_SECONDS)
            raise

    def iterate(self, items: AsyncGenerator[T]) -> Iterator[T]:
        """Yield what ``items`` yields; leaving early closes them."""
        self._generators.add(items)
        try:
            while (item := self.run(_next(items))) is not _END:
                yield cast("T", item)
        finally:
            self._close_items(items)

    def close(self) -> None:
        """Close what is being yielded, cancel what still runs, and end the thread. Calling it again does nothing."""
        if self._thread.is_alive():
            for items in tuple(self._generators):
                self._close_items(items)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _close_items(self, items: AsyncGenerator[Any]) -> None:
        if items in self._generators:
            self._generators.discard(items)
            closing = self._start(_close(items))
            # The garbage collector may come here on any thread: the loop's own must not wait for itself.
            if closing is not None and threading.current_thread() is not self._thread:
                with contextlib.suppress(CancelledError, TimeoutError):
                    closing.result(_CANCEL_GRACE_SECONDS)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T] | None:
        """Hand ``work`` to the loop; ``None`` when the portal is closed."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            return None

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()


async def _run_and_signal(work: Coroutine[Any, Any, T], over: threading.Event) -> T:
    try:
        return await work
    finally:
        over.set()


async def _next(items: AsyncGenerator[object]) -> object:
    return await anext(items, _END)


async def _close(items: AsyncGenerator[object]) -> None:
    # One that another thread waits on is busy; it is cancelled with all that runs.
    with contextlib.suppress(RuntimeError):
        await items.aclose()


def _closed_error() -> OctoError:
    return OctoError("The client is closed.", code="state_conflict")


A = TypeVar("A")
P = ParamSpec("P")


class SyncFacade(Generic[A]):
    """Plain code's view of something for asyncio."""

    def __init__(self, portal: Portal, inner: A) -> None:
        self.portal = portal
        self.inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"


def to_sync(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncFacade[A], P], T]:
    """Return ``method`` as one that waits."""

    @functools.wraps(method)
    def call(self: SyncFacade[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.portal.run(method(self.inner, *args, **kwargs))

    return call


def to_sync_iterator(
    method: Callable[Concatenate[A, P], AsyncGenerator[T]],
) -> Callable[Concatenate[SyncFacade[A], P], Iterator[T]]:
    """Return ``method`` as one that gives a plain iterator; leaving the loop closes what it has open."""

    @functools.wraps(method)
    def call(self: SyncFacade[A], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.portal.iterate(method(self.inner, *args, **kwargs))

    return call


def to_sync_task(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, AsyncTaskHandle]],
) -> Callable[Concatenate[SyncFacade[AsyncClient], P], TaskHandle]:
    """Return ``method`` as one that waits and gives the task for plain code."""

    @functools.wraps(method)
    def call(self: SyncFacade[AsyncClient], /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle:
        return TaskHandle(self.portal, self.portal.run(method(self.inner, *args, **kwargs)))

    return call


class TaskHandle(SyncFacade[AsyncTaskHandle]):
    """A task by its ``id``: :class:`TaskHandle` for plain code."""

    @property
    def id(self) -> str:
        """Return the task's id."""
        return self.inner.id

    read = to_sync(AsyncTaskHandle.read)
    cancel = to_sync(AsyncTaskHandle.cancel)
    updates = to_sync_iterator(AsyncTaskHandle.updates)
    result = to_sync(AsyncTaskHandle.result)
    wait = to_sync(AsyncTaskHandle.wait)
    history = to_sync_iterator(AsyncTaskHandle.history)
    texts = to_sync(AsyncTaskHandle.texts)
    artifact = to_sync(AsyncTaskHandle.artifact)
    trace = to_sync(AsyncTaskHandle.trace)


class Client(SyncFacade[AsyncClient]):
    """An installation, seen through its public door: :class:`Client` for plain code. Close it by ``with``.

    Ctrl-C cancels the call that is waited for. Threads may share one client.
    """

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; calling it again does nothing. Tasks go on."""
        if self.portal.is_closed:
            return
        try:
            self.portal.run(self.inner.aclose())
        finally:
            self.portal.close()

    def task(self, task_id: str) -> TaskHandle:
        """Return the task with that id. Nothing is asked: whether there is one shows when it is used."""
        return TaskHandle(self.portal, self.inner.task(task_id))

    submit = to_sync_task(AsyncClient.submit)
    tasks = to_sync_iterator(AsyncClient.tasks)
    task_page = to_sync(AsyncClient.task_page)
    upload = to_sync(AsyncClient.upload)
    download = to_sync(AsyncClient.download)
    events = to_sync_iterator(AsyncClient.events)
    event_page = to_sync(AsyncClient.event_page)
    arms = to_sync(AsyncClient.arms)
    remove_arm = to_sync(AsyncClient.remove_arm)
    enrolment_tokens = to_sync(AsyncClient.enrolment_tokens)
    create_enrolment_token = to_sync(AsyncClient.create_enrolment_token)
    revoke_enrolment_token = to_sync(AsyncClient.revoke_enrolment_token)
    keys = to_sync(AsyncClient.keys)
    create_key = to_sync(AsyncClient.create_key)
    revoke_key = to_sync(AsyncClient.revoke_key)
    mint_token = to_sync(AsyncClient.mint_token)
    health = to_sync(AsyncClient.health)
    ready = to_sync(AsyncClient.ready)


def connect(
    url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    retry: RetryPolicy | None = None,
) -> AsyncClient:
    """Return a client of the installation whose public door is at ``url``. Nothing is asked yet.

    Several addresses, in a list or with commas, are doors of the same installation: when one is gone, the next is
    used. Without ``url`` it is ``OCTOLLM_URL``, else this machine's; without ``api_key`` it is ``OCTOLLM_API_KEY``.
    ``timeout`` bounds each call with its retries, in seconds, but not the transfer of files nor what is watched.
    An ``https`` address has to show a certificate that the system's authorities signed, or those of
    ``OCTOLLM_TLS_CA``. Connections are direct: no proxy is used and no redirect followed, so that the key goes nowhere
    else. Raises ``setting_invalid``.
    """
    settings = read_client_settings(os.environ)
    if url is None:
        local = local_url("reflex", port_offset=settings.port_offset, tls=settings.tls_cert is not None)
        urls: Sequence[str] = settings.urls or (local,)
    else:
        urls = [part.strip() for part in url.split(",") if part.strip()] if isinstance(url, str) else url
    clock = SystemClock()
    key = api_key or settings.api_key
    tls = None
    if any(url.startswith("https:") for url in urls):
        tls = client_context(settings.tls_ca, settings.tls_cert, settings.tls_key)
    return AsyncClient(
        GatewayTransport(urls, key, clock=clock, ids=Uuid7Generator(clock), timeout=timeout, retry=retry, tls=tls)
    )


def connect_sync(
    url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    retry: RetryPolicy | None = None,
) -> Client:
    """Return a client for plain code; see :func:`connect`. It runs on a thread of its own until it is closed."""
    inner = connect(url, api_key, timeout=timeout, retry=retry)
    return Client(Portal(), inner)
