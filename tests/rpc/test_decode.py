from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.task import Task
from octollm.errors import OctoError
from octollm.rpc.codec import decode


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        (b"", "invalid_json", ""),
        (b"\xff", "invalid_json", ""),
        (b'{"goal": ' + b"[" * 10_000, "invalid_json", ""),
        (b'{"x": ' + b"[" * 10_000, "invalid_json", ""),
        (b'{"goal": 1}', "invalid_body", "/goal"),
        (b'{"goal": "x", "context": {"files": [{"name": 1}]}}', "invalid_body", "/context/files/0/name"),
        (b'{"goal": "x", "context": {"inputs": {"a/b~c": 3}}}', "invalid_body", "/context/inputs/..."),
        (b'{"goal": "x", "a/b~c": 3}', "unknown_field", "/a~1b~0c"),
        (b'{"goal": "x", "context": {"nope": 3}}', "unknown_field", "/context/nope"),
    ],
)
def test_a_fault_has_its_place(body: bytes, code: str, pointer: str) -> None:
    with pytest.raises(OctoError) as caught:
        decode(body, Task, strict=True)
    assert caught.value.code == code
    assert caught.value.field_errors[0].pointer == pointer


def test_between_services_unknown_members_are_ignored() -> None:
    assert decode(b'{"goal": "x", "later": 1}', Task).goal == "x"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_whatever_comes_is_a_value_or_a_problem(value: object) -> None:
    try:
        decode(msgspec.json.encode(value), Task, strict=True)
    except OctoError as error:
        assert error.code in ("invalid_json", "invalid_body", "unknown_field")
