"""Writes of the public API take effect once for each idempotency key; a stored secret is encrypted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from orchestra import Orchestra, Script, orchestra, problem

from octollm.capability import SigningKey
from octollm.capability.keyring import KeyRing
from octollm.errors import OctoError
from octollm.rpc.idempotency import IdempotencyKey, ResponseCipher, StoredResponse

KEY = IdempotencyKey("local", "user", "orchestrator", "keys.create", "k-1")
RESPONSE = StoredResponse(201, b'{"secret": "octo_x"}', {"content-type": "application/json"})


async def keys_named(octo: Orchestra, name: str) -> int:
    listed = msgspec.json.decode((await octo.send("GET", "/keys")).body)["keys"]
    return sum(key["name"] == name for key in listed)


async def test_a_key_is_created_once_and_its_secret_is_not_stored_in_the_clear(tmp_path: Path) -> None:
    body = {"name": "ci", "scope": "tasks:read"}
    async with orchestra(tmp_path, Script()) as octo:
        first = await octo.send("POST", "/keys", body, Idempotency_Key="k-1")
        again = await octo.send("POST", "/keys", body, Idempotency_Key="k-1")
        assert (first.status, again.status) == (201, 201)
        assert again.body == first.body
        assert again.headers["idempotent-replayed"] == "true"
        assert await keys_named(octo, "ci") == 1
        other = await octo.send("POST", "/keys", {**body, "name": "other"}, Idempotency_Key="k-1")
        assert problem(other)["code"] == "idempotency_conflict"
        secret = msgspec.json.decode(first.body)["secret"].encode()
    stored = b"".join(file.read_bytes() for file in (tmp_path / "data").iterdir())
    assert b"k-1" in stored
    assert secret not in stored


async def test_an_enrolment_token_and_a_revocation_take_effect_once(tmp_path: Path) -> None:
    body = {"name": "parrot", "calls": [], "lifetime_seconds": 60}
    async with orchestra(tmp_path, Script()) as octo:
        first = await octo.send("POST", "/joins", body, Idempotency_Key="j-1")
        again = await octo.send("POST", "/joins", body, Idempotency_Key="j-1")
        assert (first.status, again.body) == (201, first.body)
        join_id = msgspec.json.decode(first.body)["join"]["id"]
        for _ in range(2):
            assert (await octo.send("DELETE", f"/joins/{join_id}", Idempotency_Key="j-2")).status == 200
        listed = msgspec.json.decode((await octo.send("GET", "/joins")).body)["joins"]
        assert [(join["id"], join["state"]) for join in listed] == [(join_id, "revoked")]


def test_a_response_is_decrypted_by_any_trusted_key_and_under_its_own_key_alone() -> None:
    old, new = b"1" * 32, b"2" * 32
    sealed = ResponseCipher(lambda: [old]).encrypt(KEY, RESPONSE)
    assert b"octo_x" not in sealed.body
    assert sealed.headers == RESPONSE.headers
    assert ResponseCipher(lambda: [new, old]).decrypt(KEY, sealed) == RESPONSE
    assert ResponseCipher(lambda: [old]).encrypt(KEY, RESPONSE).body != sealed.body
    moved = msgspec.structs.replace(KEY, key="k-2")
    for cipher, key, stored in (
        (ResponseCipher(lambda: [new]), KEY, sealed),
        (ResponseCipher(lambda: [old]), moved, sealed),
        (ResponseCipher(lambda: [old]), KEY, msgspec.structs.replace(sealed, body=sealed.body[:-1])),
        (ResponseCipher(lambda: [old]), KEY, msgspec.structs.replace(sealed, body=b"")),
    ):
        with pytest.raises(OctoError) as failure:
            cipher.decrypt(key, stored)
        assert failure.value.code == "outcome_unknown"


def test_derived_keys_differ_by_purpose_and_by_root() -> None:
    root, other = SigningKey.generate("root"), SigningKey.generate("root")
    [key] = KeyRing.of(root).derive_keys("one", 0.0)
    assert len(key) == 32
    assert KeyRing.of(root).derive_keys("one", 5.0) == [key]
    assert KeyRing.of(root).derive_keys("two", 0.0) != [key]
    assert KeyRing.of(other).derive_keys("one", 0.0) != [key]
    assert KeyRing.of([root, other]).derive_keys("one", 1e9)[0] == key
