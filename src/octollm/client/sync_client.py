"""Client: AsyncClient for synchronous code, on an event loop in a thread.

Each method is derived from the one of the asynchronous class, with its signature and docstring. A test asserts that
both sides have the same methods.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from octollm.client._transport import DEFAULT_TIMEOUT_SECONDS
from octollm.client.admin import AsyncAdmin
from octollm.client.async_client import AsyncClient
from octollm.client.memory import AsyncMemory
from octollm.client.schedules import AsyncSchedules
from octollm.client.subscriptions import AsyncSubscriptions
from octollm.client.task import AsyncTaskHandle
from octollm.client.typed_output import OutputT
from octollm.errors import OctoError

if TYPE_CHECKING:
    from octollm.resilience import RetryPolicy

A = TypeVar("A")
T = TypeVar("T")
P = ParamSpec("P")

_CANCEL_GRACE_SECONDS = 5.0
"""How long an interrupted call may take to close its connections."""
_END = object()


class Portal:
    """An event loop in a thread, on which other threads run coroutines. :meth:`close` ends the thread.

    anyio's blocking portal has no daemon thread and does not close generators that the caller abandons.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._generators: set[AsyncGenerator[Any]] = set()
        # A daemon thread: a program that forgets to close its client still ends.
        self._thread = threading.Thread(target=self._serve, name="octollm-client", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return not self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` and return its result. An exception in the waiting thread, such as Ctrl-C, cancels it.

        Raises ``state_conflict`` after :meth:`close`.
        """
        done_event = threading.Event()
        future = self._start(_run_and_signal(work, done_event))
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
                done_event.wait(_CANCEL_GRACE_SECONDS)
            raise

    def iterate(self, items: AsyncGenerator[T]) -> Iterator[T]:
        """Iterate over ``items``; leaving the loop early closes them."""
        self._generators.add(items)
        try:
            while (item := self.run(_next(items))) is not _END:
                yield cast("T", item)
        finally:
            self._close_items(items)

    def close(self) -> None:
        """Close open generators, cancel running calls, and end the thread. Calling it again does nothing."""
        if self._thread.is_alive():
            for items in tuple(self._generators):
                self._close_items(items)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _close_items(self, items: AsyncGenerator[Any]) -> None:
        if items in self._generators:
            self._generators.discard(items)
            closing = self._start(_close(items))
            # The garbage collector may call this on any thread; the loop's own thread must not wait for itself.
            if closing is not None and threading.current_thread() is not self._thread:
                with contextlib.suppress(CancelledError, TimeoutError):
                    closing.result(_CANCEL_GRACE_SECONDS)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T] | None:
        """Schedule ``work`` on the loop; return ``None`` when the portal is closed."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            return None

    def _serve(self) -> None:
        # The runner cancels what still runs once the loop is stopped, and closes the loop.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()


async def _run_and_signal(work: Coroutine[Any, Any, T], done_event: threading.Event) -> T:
    try:
        return await work
    finally:
        done_event.set()


async def _next(items: AsyncGenerator[object]) -> object:
    return await anext(items, _END)


async def _close(items: AsyncGenerator[object]) -> None:
    # A generator that another thread iterates is running and cannot be closed; closing the loop cancels it.
    with contextlib.suppress(RuntimeError):
        await items.aclose()


def _closed_error() -> OctoError:
    return OctoError("The client is closed.", code="state_conflict")


class SyncFacade(Generic[A]):
    """The synchronous view of an asynchronous object."""

    def __init__(self, portal: Portal, inner: A) -> None:
        self._portal = portal
        self._inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._inner!r})"

    @property
    def portal(self) -> Portal:
        """The event loop on which the calls run."""
        return self._portal

    @property
    def inner(self) -> A:
        """The asynchronous object."""
        return self._inner


def to_sync(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncFacade[A], P], T]:
    """Derive a method that waits for the coroutine of ``method``."""

    @functools.wraps(method)
    def call(self: SyncFacade[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.portal.run(method(self.inner, *args, **kwargs))

    return call


def to_sync_iterator(
    method: Callable[Concatenate[A, P], AsyncGenerator[T]],
) -> Callable[Concatenate[SyncFacade[A], P], Iterator[T]]:
    """Derive a method that returns a plain iterator; leaving its loop closes the stream."""

    @functools.wraps(method)
    def call(self: SyncFacade[A], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.portal.iterate(method(self.inner, *args, **kwargs))

    return call


def to_sync_handle(
    method: Callable[Concatenate[AsyncClient, P], AsyncTaskHandle[OutputT]],
) -> Callable[Concatenate[SyncFacade[AsyncClient], P], TaskHandle[OutputT]]:
    """Derive a method that returns the synchronous handle of a task."""

    @functools.wraps(method)
    def call(self: SyncFacade[AsyncClient], /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[OutputT]:
        return TaskHandle(self.portal, method(self.inner, *args, **kwargs))

    return call


def to_sync_submit(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, AsyncTaskHandle[OutputT]]],
) -> Callable[Concatenate[SyncFacade[AsyncClient], P], TaskHandle[OutputT]]:
    """Derive a method that waits and returns the synchronous handle of a task."""

    @functools.wraps(method)
    def call(self: SyncFacade[AsyncClient], /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[OutputT]:
        return TaskHandle(self.portal, self.portal.run(method(self.inner, *args, **kwargs)))

    return call


def to_sync_successor(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, AsyncTaskHandle[OutputT]]],
) -> Callable[Concatenate[SyncFacade[A], P], TaskHandle[OutputT]]:
    """Derive a method that waits and returns the synchronous handle of a task that follows another."""

    @functools.wraps(method)
    def call(self: SyncFacade[A], /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[OutputT]:
        return TaskHandle(self.portal, self.portal.run(method(self.inner, *args, **kwargs)))

    return call


class TaskHandle(SyncFacade[AsyncTaskHandle[OutputT]], Generic[OutputT]):
    """A task by its ``id``: :class:`AsyncTaskHandle` for synchronous code."""

    @property
    def id(self) -> str:
        """The task's id."""
        return self.inner.id

    read = to_sync(AsyncTaskHandle[OutputT].read)
    cancel = to_sync(AsyncTaskHandle[OutputT].cancel)
    approve = to_sync(AsyncTaskHandle[OutputT].approve)
    reject = to_sync(AsyncTaskHandle[OutputT].reject)
    updates = to_sync_iterator(AsyncTaskHandle[OutputT].updates)
    result = to_sync(AsyncTaskHandle[OutputT].result)
    wait = to_sync(AsyncTaskHandle[OutputT].wait)
    history = to_sync_iterator(AsyncTaskHandle[OutputT].history)
    pause = to_sync(AsyncTaskHandle[OutputT].pause)
    resume = to_sync(AsyncTaskHandle[OutputT].resume)
    instruct = to_sync(AsyncTaskHandle[OutputT].instruct)
    skip = to_sync(AsyncTaskHandle[OutputT].skip)
    extend = to_sync(AsyncTaskHandle[OutputT].extend)
    attempts = to_sync_iterator(AsyncTaskHandle[OutputT].attempts)
    recording = to_sync(AsyncTaskHandle[OutputT].recording)
    retry = to_sync_successor(AsyncTaskHandle[OutputT].retry)
    fork = to_sync_successor(AsyncTaskHandle[OutputT].fork)
    texts = to_sync(AsyncTaskHandle[OutputT].texts)
    artifact = to_sync(AsyncTaskHandle[OutputT].artifact)
    trace = to_sync(AsyncTaskHandle[OutputT].trace)


class Admin(SyncFacade[AsyncAdmin]):
    """Administration of an installation: :class:`AsyncAdmin` for synchronous code."""

    keys = to_sync(AsyncAdmin.keys)
    create_key = to_sync(AsyncAdmin.create_key)
    revoke_key = to_sync(AsyncAdmin.revoke_key)
    enrolment_tokens = to_sync(AsyncAdmin.enrolment_tokens)
    create_enrolment_token = to_sync(AsyncAdmin.create_enrolment_token)
    revoke_enrolment_token = to_sync(AsyncAdmin.revoke_enrolment_token)
    remove_arm = to_sync(AsyncAdmin.remove_arm)
    hooks = to_sync(AsyncAdmin.hooks)
    hook = to_sync(AsyncAdmin.hook)
    create_hook = to_sync(AsyncAdmin.create_hook)
    rotate_hook = to_sync(AsyncAdmin.rotate_hook)
    delete_hook = to_sync(AsyncAdmin.delete_hook)
    webhooks = to_sync(AsyncAdmin.webhooks)
    webhook = to_sync(AsyncAdmin.webhook)
    create_webhook = to_sync(AsyncAdmin.create_webhook)
    update_webhook = to_sync(AsyncAdmin.update_webhook)
    rotate_webhook = to_sync(AsyncAdmin.rotate_webhook)
    test_webhook = to_sync(AsyncAdmin.test_webhook)
    webhook_deliveries = to_sync(AsyncAdmin.webhook_deliveries)
    replay_webhook = to_sync(AsyncAdmin.replay_webhook)
    delete_webhook = to_sync(AsyncAdmin.delete_webhook)
    mint_token = to_sync(AsyncAdmin.mint_token)
    revoke_token = to_sync(AsyncAdmin.revoke_token)
    revoke_service = to_sync(AsyncAdmin.revoke_service)
    revoke_principal = to_sync(AsyncAdmin.revoke_principal)
    audit = to_sync(AsyncAdmin.audit)


class Subscriptions(SyncFacade[AsyncSubscriptions]):
    """Durable subscriptions: :class:`AsyncSubscriptions` for synchronous code."""

    list = to_sync(AsyncSubscriptions.list)
    sink = to_sync(AsyncSubscriptions.sink)
    read = to_sync(AsyncSubscriptions.read)
    put = to_sync(AsyncSubscriptions.put)
    delete = to_sync(AsyncSubscriptions.delete)
    poll = to_sync(AsyncSubscriptions.poll)
    acknowledge = to_sync(AsyncSubscriptions.acknowledge)
    events = to_sync_iterator(AsyncSubscriptions.events)
    replay = to_sync(AsyncSubscriptions.replay)
    dead_letters = to_sync(AsyncSubscriptions.dead_letters)
    retry_dead_letter = to_sync(AsyncSubscriptions.retry_dead_letter)
    drop_dead_letter = to_sync(AsyncSubscriptions.drop_dead_letter)


class Memory(SyncFacade[AsyncMemory]):
    """The tenant's memory: :class:`AsyncMemory` for synchronous code."""

    put_fact = to_sync(AsyncMemory.put_fact)
    fact = to_sync(AsyncMemory.fact)
    fact_history = to_sync(AsyncMemory.fact_history)
    facts = to_sync_iterator(AsyncMemory.facts)
    erase_fact = to_sync(AsyncMemory.erase_fact)
    store_document = to_sync(AsyncMemory.store_document)
    document = to_sync(AsyncMemory.document)
    documents = to_sync_iterator(AsyncMemory.documents)
    search = to_sync(AsyncMemory.search)
    erase_document = to_sync(AsyncMemory.erase_document)
    erase_task = to_sync(AsyncMemory.erase_task)
    erase_all = to_sync(AsyncMemory.erase_all)


class Schedules(SyncFacade[AsyncSchedules]):
    """The tenant's schedules: :class:`AsyncSchedules` for synchronous code."""

    create = to_sync(AsyncSchedules.create)
    list = to_sync(AsyncSchedules.list)
    read = to_sync(AsyncSchedules.read)
    pause = to_sync(AsyncSchedules.pause)
    resume = to_sync(AsyncSchedules.resume)
    run = to_sync(AsyncSchedules.run)
    delete = to_sync(AsyncSchedules.delete)


class Client(SyncFacade[AsyncClient]):
    """A client of an installation for synchronous code, with the arguments of :class:`AsyncClient`.

    Close it by ``with`` or :meth:`close`. Ctrl-C cancels the running call. Threads may share one client.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
    ) -> None:
        # The inner client first: a wrong argument starts no thread.
        inner = AsyncClient(url, api_key, timeout=timeout, retry=retry)
        super().__init__(Portal(), inner)
        self.admin = Admin(self.portal, inner.admin)
        self.memory = Memory(self.portal, inner.memory)
        self.schedules = Schedules(self.portal, inner.schedules)
        self.subscriptions = Subscriptions(self.portal, inner.subscriptions)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; calling it again does nothing. Tasks continue."""
        if self.portal.is_closed:
            return
        try:
            self.portal.run(self.inner.aclose())
        finally:
            self.portal.close()

    @property
    def url(self) -> str:
        """The gateway's address in use."""
        return self.inner.url

    submit = to_sync_submit(AsyncClient.submit)
    task = to_sync_handle(AsyncClient.task)
    tasks = to_sync_iterator(AsyncClient.tasks)
    task_page = to_sync(AsyncClient.task_page)
    approvals = to_sync(AsyncClient.approvals)
    usage = to_sync(AsyncClient.usage)
    upload = to_sync(AsyncClient.upload)
    download = to_sync(AsyncClient.download)
    events = to_sync_iterator(AsyncClient.events)
    event_page = to_sync(AsyncClient.event_page)
    arms = to_sync(AsyncClient.arms)
    services = to_sync(AsyncClient.services)
    preprocess = to_sync(AsyncClient.preprocess)
    who_am_i = to_sync(AsyncClient.who_am_i)
    health = to_sync(AsyncClient.health)
    ready = to_sync(AsyncClient.ready)


def connect_sync(
    url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    retry: RetryPolicy | None = None,
) -> Client:
    """Return a :class:`Client` with these arguments."""
    return Client(url, api_key, timeout=timeout, retry=retry)
