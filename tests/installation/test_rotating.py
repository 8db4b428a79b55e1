"""`octollm keys rotate` on files: who has to believe a new key is written first, and nothing old is lost too soon."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from octollm.capability.keyring import OVERLAP_SECONDS, TRUST_SECONDS
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import read_settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.installation import provisioning as rotating
from octollm.installation.home import open_home
from octollm.installation.keys import load_home_keys
from octollm.installation.provisioning import (
    load_provisioned_keys,
    load_trusted_roots,
    provision_keys,
    rotate_signing_key,
)

IDS = Uuid7Generator(SystemClock())
NOW = 1_800_000_000.0
SIGNS = NOW + OVERLAP_SECONDS


def test_a_service_gets_a_second_key_that_the_orchestrator_knows_first(tmp_path: Path):
    provision_keys(tmp_path, IDS)
    before = load_provisioned_keys(tmp_path / "coder", "coder", NOW).own.signing_key(NOW).thumbprint
    done = rotate_signing_key(tmp_path, "coder", IDS, NOW)
    assert (done.before, done.signs_at) == (before, SIGNS)
    assert [path.name for path in done.files] == ["services.json", "coder.jwk"]
    coder = load_provisioned_keys(tmp_path / "coder", "coder", NOW).own
    top = load_provisioned_keys(tmp_path / "orchestrator", "orchestrator", NOW).root
    assert top is not None
    for now, first in ((NOW, before), (SIGNS, done.fresh)):
        assert coder.signing_key(now).thumbprint == first
        assert list(top.services["coder"].trusted_keys(now)) == list(coder.trusted_keys(now))
        assert next(iter(top.services["coder"].trusted_keys(now))) == first
    assert coder.find(before) is not None
    assert '"d"' not in (tmp_path / "orchestrator" / "services.json").read_text()
    assert len(top.services["judge"].trusted_keys(NOW)) == 1
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in done.files)


def test_a_new_root_is_known_to_every_service_before_it_signs(tmp_path: Path):
    provision_keys(tmp_path, IDS)
    done = rotate_signing_key(tmp_path, "root", IDS, NOW)
    assert done.files[-1].name == "root.jwk"
    for name in SERVICES:
        assert set(load_provisioned_keys(tmp_path / name, name, NOW).roots) == {done.before, done.fresh}
        late = NOW + OVERLAP_SECONDS + TRUST_SECONDS
        assert set(load_provisioned_keys(tmp_path / name, name, late).roots) == {done.fresh}
    top = load_provisioned_keys(tmp_path / "orchestrator", "orchestrator", NOW).root
    assert top is not None
    assert top.root.signing_key(NOW).thumbprint == done.before
    assert top.root.signing_key(SIGNS).thumbprint == done.fresh


def test_a_key_in_other_hands_is_replaced_at_once_and_still_checks_old_checkpoints(tmp_path: Path):
    provision_keys(tmp_path, IDS)
    done = rotate_signing_key(tmp_path, "root", IDS, NOW, is_compromised=True)
    assert done.signs_at == NOW
    assert set(load_provisioned_keys(tmp_path / "memory", "memory", NOW).roots) == {done.fresh}
    top = load_provisioned_keys(tmp_path / "orchestrator", "orchestrator", NOW).root
    assert top is not None
    assert top.root.find(done.before) is None
    settings = read_settings({"OCTOLLM_KEYS": str(tmp_path / "orchestrator")}, tuple(SERVICES))
    assert set(load_trusted_roots(settings)) == {done.before, done.fresh}


def test_it_can_be_done_again_and_again_and_forgets_what_is_long_over(tmp_path: Path):
    provision_keys(tmp_path, IDS)
    for number in range(5):
        rotate_signing_key(tmp_path, "root", IDS, NOW + number * 200_000)
    now = NOW + 5 * 200_000
    top = load_provisioned_keys(tmp_path / "orchestrator", "orchestrator", now).root
    assert top is not None
    assert len(top.root) <= 3
    assert len(top.root.trusted_keys(now)) == 1
    assert len(json.loads((tmp_path / "judge" / "roots.jwks").read_text())["keys"]) == 6, "for old checkpoints"


def test_too_many_changes_in_a_day_are_refused_before_anything_is_written(tmp_path: Path):
    provision_keys(tmp_path, IDS)
    for number in range(15):
        rotate_signing_key(tmp_path, "judge", IDS, NOW + number)
    before = (tmp_path / "judge" / "judge.jwk").read_bytes()
    with pytest.raises(OctoError) as caught:
        rotate_signing_key(tmp_path, "judge", IDS, NOW + 100)
    assert caught.value.code == "state_conflict"
    assert (tmp_path / "judge" / "judge.jwk").read_bytes() == before


async def test_the_keys_of_a_home(tmp_path: Path):
    async with open_home(tmp_path) as home:
        first = load_home_keys(home, IDS)
        for name in ("root", "coder"):
            done = rotate_signing_key(home.keys, name, IDS, NOW)
            assert [path.name for path in done.files] == [f"{name}.jwk"]
        keys = load_home_keys(home, IDS)
    assert set(keys.roots(NOW)) > set(first.roots(NOW))
    assert len(keys.public["coder"].trusted_keys(NOW)) == 2
    assert keys.services["judge"].trusted_keys(NOW) == first.services["judge"].trusted_keys(NOW)
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, tuple(SERVICES))
    assert set(load_trusted_roots(settings)) == set(keys.roots(NOW))


def test_a_failure_in_between_leaves_an_installation_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    provision_keys(tmp_path, IDS)
    write, written = rotating.write_private, 0

    def full(*arguments: object) -> None:
        nonlocal written
        written += 1
        if written > 4:
            raise OctoError("No space left on device.", code="home_unusable")
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rotating, "write_private", full)
    with pytest.raises(OctoError):
        rotate_signing_key(tmp_path, "root", IDS, NOW)
    top = load_provisioned_keys(tmp_path / "orchestrator", "orchestrator", NOW).root
    assert top is not None
    signer = top.root.signing_key(NOW + 10 * OVERLAP_SECONDS).thumbprint
    for name in SERVICES:
        assert signer in load_provisioned_keys(tmp_path / name, name, NOW).roots


def test_what_is_no_name_or_no_folder_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(OctoError, match="There are root, reflex"):
        rotate_signing_key(tmp_path, "translator", IDS, NOW)
    with pytest.raises(OctoError, match="cannot be read"):
        rotate_signing_key(tmp_path, "coder", IDS, NOW)
