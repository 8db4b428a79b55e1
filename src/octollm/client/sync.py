"""The client for plain code: the methods of the one for asyncio, run on the loop of a portal.

Nothing is written twice. ``blocking`` and ``iterating`` make a method out of the one of the same name, with its
parameters, its docstring and its types, so that a type checker sees the same signatures without ``await``.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from octollm.client.client import Client
from octollm.client.portal import Portal
from octollm.client.task import TaskHandle

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")


class Blocking(Generic[A]):
    """Plain code's view of something for asyncio."""

    def __init__(self, portal: Portal, inner: A) -> None:
        self.portal = portal
        self.inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"


def blocking(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Blocking[A], P], T]:
    """Return ``method`` as one that waits."""

    @functools.wraps(method)
    def call(self: Blocking[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.portal.run(method(self.inner, *args, **kwargs))

    return call


def iterating(
    method: Callable[Concatenate[A, P], AsyncGenerator[T]],
) -> Callable[Concatenate[Blocking[A], P], Iterator[T]]:
    """Return ``method`` as one that gives a plain iterator; leaving the loop closes what it has open."""

    @functools.wraps(method)
    def call(self: Blocking[A], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.portal.iterate(method(self.inner, *args, **kwargs))

    return call


def submitting(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, TaskHandle]],
) -> Callable[Concatenate[Blocking[Client], P], SyncTask]:
    """Return ``method`` as one that waits and gives the task for plain code."""

    @functools.wraps(method)
    def call(self: Blocking[Client], /, *args: P.args, **kwargs: P.kwargs) -> SyncTask:
        return SyncTask(self.portal, self.portal.run(method(self.inner, *args, **kwargs)))

    return call


class SyncTask(Blocking[TaskHandle]):
    """A task by its ``id``: :class:`TaskHandle` for plain code."""

    @property
    def id(self) -> str:
        """Return the task's id."""
        return self.inner.id

    read = blocking(TaskHandle.read)
    cancel = blocking(TaskHandle.cancel)
    updates = iterating(TaskHandle.updates)
    result = blocking(TaskHandle.result)
    ended = blocking(TaskHandle.ended)
    history = iterating(TaskHandle.history)
    texts = blocking(TaskHandle.texts)
    artifact = blocking(TaskHandle.artifact)
    trace = blocking(TaskHandle.trace)


class SyncClient(Blocking[Client]):
    """An installation, seen through its public door: :class:`Client` for plain code. Close it by ``with``.

    Ctrl-C cancels the call that is waited for. Threads may share one client.
    """

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; calling it again does nothing. Tasks go on."""
        if self.portal.closed:
            return
        try:
            self.portal.run(self.inner.aclose())
        finally:
            self.portal.close()

    def task(self, task_id: str) -> SyncTask:
        """Return the task with that id. Nothing is asked: whether there is one shows when it is used."""
        return SyncTask(self.portal, self.inner.task(task_id))

    submit = submitting(Client.submit)
    tasks = iterating(Client.tasks)
    task_page = blocking(Client.task_page)
    upload = blocking(Client.upload)
    download = blocking(Client.download)
    events = iterating(Client.events)
    event_page = blocking(Client.event_page)
    arms = blocking(Client.arms)
    remove_arm = blocking(Client.remove_arm)
    joins = blocking(Client.joins)
    create_join = blocking(Client.create_join)
    revoke_join = blocking(Client.revoke_join)
    keys = blocking(Client.keys)
    create_key = blocking(Client.create_key)
    revoke_key = blocking(Client.revoke_key)
    mint_token = blocking(Client.mint_token)
    health = blocking(Client.health)
    ready = blocking(Client.ready)
