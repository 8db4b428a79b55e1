"""The client for plain code: the methods of the one for asyncio, run on the loop of a portal.

Nothing is written twice. ``to_sync`` and ``to_sync_iterator`` make a method out of the one of the same name, with its
parameters, its docstring and its types, so that a type checker sees the same signatures without ``await``.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from octollm.client.client import AsyncClient
from octollm.client.portal import Portal
from octollm.client.task import AsyncTaskHandle

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")


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
