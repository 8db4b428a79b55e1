"""The synchronous client has the methods of the asynchronous one, and both have all public operations."""

from __future__ import annotations

import inspect
import re
import threading
from pathlib import Path

import pytest

import octollm
from octollm.client import (
    Admin,
    AsyncAdmin,
    AsyncClient,
    AsyncMemory,
    AsyncSchedules,
    AsyncSubscriptions,
    AsyncTaskHandle,
    Client,
    Memory,
    Schedules,
    Subscriptions,
    TaskHandle,
    admin,
    async_client,
    memory,
    schedules,
    subscriptions,
    task,
)
from octollm.contracts.declarations import DeclaredOperation
from octollm.contracts.public_api import PUBLIC_OPERATIONS
from octollm.errors import SettingError

PAIRS = [
    (AsyncClient, Client),
    (AsyncAdmin, Admin),
    (AsyncTaskHandle, TaskHandle),
    (AsyncMemory, Memory),
    (AsyncSubscriptions, Subscriptions),
    (AsyncSchedules, Schedules),
]
MODULES = (async_client, admin, memory, schedules, subscriptions, task)
RENAMED = {"aclose": "close"}
OF_THE_FACADE = {"portal", "inner"}
ATTRIBUTES = {"admin", "id", "memory", "schedules", "subscriptions"}
"""Attributes of the instances: whether the class has them, too, differs."""

WITHOUT_METHOD = {
    "dashboard.watch": "for pages, which /client.js serves",
    "tasks.events": "the frames of the WebSocket, which updates() reads",
    "hooks.receive": "for the systems that send webhooks",
    "session.open": "for the page, whose browser keeps the cookie",
    "session.issuers": "for the page",
    "events.describe": "a description, for programs",
    "session.end": "for the page",
}


def public_names(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(("asynchronous", "synchronous"), PAIRS)
def test_both_have_the_same_methods(asynchronous, synchronous):
    expected = {RENAMED.get(name, name) for name in public_names(asynchronous)}
    assert public_names(synchronous) - OF_THE_FACADE - ATTRIBUTES == expected - ATTRIBUTES


@pytest.mark.parametrize(("asynchronous", "synchronous"), PAIRS)
def test_each_method_is_derived_with_its_signature_and_docstring(asynchronous, synchronous):
    derived = 0
    for name in public_names(asynchronous) - set(RENAMED):
        method = getattr(asynchronous, name)
        if inspect.isfunction(method):
            other = getattr(synchronous, name)
            assert other.__wrapped__ is method
            assert inspect.signature(other) == inspect.signature(method)
            assert other.__doc__ == method.__doc__
            derived += 1
    assert derived >= 7


def test_both_constructors_have_the_same_parameters():
    assert inspect.signature(Client) == inspect.signature(AsyncClient)
    for connect in (octollm.connect, octollm.connect_sync):
        assert list(inspect.signature(connect).parameters) == list(inspect.signature(Client).parameters)


def test_every_public_operation_is_called_by_a_method():
    names: dict[str, str] = {}
    for module in MODULES:
        names |= {name: value.id for name, value in vars(module).items() if isinstance(value, DeclaredOperation)}
    sources = "".join(Path(module.__file__ or "").read_text() for module in MODULES)
    called = {names[name] for name in re.findall(r"\.call\(\s*([A-Z_]+)", sources)}
    offered = {operation.id for operation in PUBLIC_OPERATIONS}
    assert called <= offered
    assert offered - called == set(WITHOUT_METHOD)


def test_a_wrong_argument_starts_no_thread():
    before = threading.active_count()
    with pytest.raises(SettingError):
        Client("ftp://nowhere")
    assert threading.active_count() == before


def test_the_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("OCTOLLM_URL", "http://10.0.0.1:8000,http://10.0.0.2:8000")
    with Client() as client:
        assert client.url == "http://10.0.0.1:8000"
    with Client("http://10.0.0.3:8000/") as client:
        assert client.url == "http://10.0.0.3:8000"
    with pytest.raises(SettingError):
        AsyncClient(api_key="with a space")
