"""Sockets are bound together, before anything starts."""

from __future__ import annotations

import socket

import pytest

from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.installation.network import bind_all, is_loopback

FREE = dict.fromkeys(SERVICES, 0)


def test_every_service_has_a_socket_and_a_url():
    with bind_all("127.0.0.1", 0, FREE) as bound:
        assert set(bound.sockets) == set(bound.urls) == set(SERVICES)
        for name, url in bound.urls.items():
            assert url == f"http://127.0.0.1:{bound.sockets[name].getsockname()[1]}"
        assert len(set(bound.urls.values())) == len(SERVICES)


def test_sockets_close_when_nobody_took_them_over():
    with bind_all("127.0.0.1", 0, FREE) as bound:
        sockets = list(bound.sockets.values())
    assert all(one.fileno() == -1 for one in sockets)


def test_a_taken_port_is_named_with_what_to_do():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OctoError) as caught, bind_all("127.0.0.1", 0, {**FREE, "judge": port}):
            pass
    assert caught.value.code == "port_taken"
    assert str(port) in caught.value.detail
    assert "judge" in caught.value.detail
    assert "OCTOLLM_PORT_OFFSET" in caught.value.detail


def test_all_addresses_are_reached_over_loopback():
    with bind_all("0.0.0.0", 0, FREE) as bound:
        assert all(url.startswith("http://127.0.0.1:") for url in bound.urls.values())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_not_loopback(host):
    assert not is_loopback(host)
