import os

from hypothesis import given
from hypothesis import strategies as st

from octollm.llm.catalogue import MODEL_CATALOGUE
from octollm.llm.embedded import batch_tokens, default_threads, round_context


def test_one_core_is_left_to_the_services():
    assert 1 <= default_threads() <= max(1, (os.cpu_count() or 1) - 1)


def test_a_batch_is_what_a_cancel_can_wait_for():
    half, one = (entry.size for entry in MODEL_CATALOGUE)
    assert batch_tokens(half, 1) == 64
    assert batch_tokens(one, 1) == 32
    assert batch_tokens(one, 7) == 224
    assert batch_tokens(half, 63) == 512


@given(st.integers(1, 10**12), st.integers(1, 256))
def test_a_batch_is_bounded(size, threads):
    assert 32 <= batch_tokens(size, threads) <= 512


@given(st.integers(1, 100_000))
def test_the_context_is_whole_blocks_and_never_less_than_asked_for(wanted):
    context = round_context(wanted, 32_768)
    assert context % 256 == 0
    assert context >= min(wanted, 32_768)
    assert context <= 32_768
