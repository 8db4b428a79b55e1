"""A name stands for every address that DNS has for it, and follows them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.errors import OctoError
from octollm.rpc.discovery import DnsRecords, DnsResolver, StaticDiscovery
from octollm.testing import wait_until

NAME = "http://coder-arm:8102"


class FakeDns:
    """A DNS of the test's: what it answers may be changed."""

    def __init__(self, *addresses: str, ttl: float = 0.0) -> None:
        self.addresses = addresses
        self.ttl = ttl
        self.queries: list[str] = []

    async def __call__(self, name: str) -> DnsRecords:
        self.queries.append(name)
        if not self.addresses:
            raise LookupError(name)
        return DnsRecords(self.addresses, self.ttl)


async def test_a_name_becomes_its_addresses_with_its_port():
    answers = FakeDns("10.0.0.1", "10.0.0.2", "fd00::1", ttl=30)
    async with DnsResolver(resolve=answers) as names:
        discovery = StaticDiscovery({"coder": (NAME,)}, names)
        # Until DNS has answered, the operating system is asked.
        assert discovery.instances("coder") == (NAME,)
        await wait_until(lambda: len(discovery.instances("coder")) == 3, description="DNS answered")
        assert discovery.instances("coder") == (
            "http://10.0.0.1:8102",
            "http://10.0.0.2:8102",
            "http://[fd00::1]:8102",
        )
    assert answers.queries == ["coder-arm"]


async def test_a_change_is_followed_when_the_records_have_run_out():
    answers = FakeDns("10.0.0.1")
    async with DnsResolver(resolve=answers) as names:
        await wait_until(lambda: names.expand([NAME]) == ("http://10.0.0.1:8102",), description="the first answer")
        answers.addresses = ("10.0.0.9",)
        await wait_until(
            lambda: names.expand([NAME]) == ("http://10.0.0.9:8102",), description="the second answer", timeout=5
        )


async def test_the_last_addresses_stay_when_dns_is_away():
    answers = FakeDns("10.0.0.1")
    async with DnsResolver(resolve=answers) as names:
        await wait_until(lambda: names.expand([NAME]) != (NAME,), description="the first answer")
        answers.addresses = ()
        queries = len(answers.queries)
        await wait_until(lambda: len(answers.queries) > queries, description="DNS was asked again", timeout=5)
        assert names.expand([NAME]) == ("http://10.0.0.1:8102",)


@given(
    st.sampled_from(
        ["http://127.0.0.1:8102", "http://[::1]:8102", "https://coder.example:8102", "http://localhost:8102"]
    )
)
def test_addresses_certificates_and_this_machine_are_left_alone(url: str):
    assert DnsResolver().expand([url]) == (url,)


def test_a_service_without_an_address_says_which_setting_is_missing():
    with pytest.raises(OctoError, match="OCTOLLM_CODER_URL"):
        StaticDiscovery({}).instances("coder")
