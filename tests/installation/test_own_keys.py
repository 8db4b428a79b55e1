"""The keys of services that run apart: provisioned once, each with what it needs and no more."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import pytest

from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings, read_settings
from octollm.contracts.services import SERVICES
from octollm.errors import SettingError
from octollm.installation.provisioning import load_provisioned_keys, load_service_keys, provision_keys

IDS = Uuid7Generator(SystemClock())
NOW = 1_800_000_000.0


def settings(**environment: str) -> Settings:
    return read_settings({f"OCTOLLM_{name.upper()}": value for name, value in environment.items()}, tuple(SERVICES))


def test_each_service_gets_its_own_key_and_the_root_in_public(tmp_path: Path):
    provision_keys(tmp_path, IDS)
    top = load_provisioned_keys(tmp_path / "orchestrator", "orchestrator", NOW)
    assert top.root is not None
    assert top.root.local is not None
    assert top.root.local.startswith("octo_local_")
    for name in SERVICES:
        keys = load_provisioned_keys(tmp_path / name, name, NOW)
        assert keys.own.trusted_keys(NOW) == top.root.services[name].trusted_keys(NOW)
        assert set(keys.roots) == set(top.root.root.trusted_keys(NOW))
        if name != "orchestrator":
            assert keys.root is None
            assert sorted(path.name for path in (tmp_path / name).iterdir()) == [f"{name}.jwk", "roots.jwks"]
            assert '"d"' not in (tmp_path / name / "roots.jwks").read_text()
    assert '"d"' not in (tmp_path / "orchestrator" / "services.json").read_text()


def test_it_can_be_run_again_and_keeps_what_is_there(tmp_path: Path):
    first = provision_keys(tmp_path, IDS)
    before = {path: path.read_bytes() for path in first}
    (tmp_path / "judge" / "roots.jwks").unlink()
    assert provision_keys(tmp_path, IDS) == [tmp_path / "judge" / "roots.jwks"]
    assert {path: path.read_bytes() for path in before} == before


def test_every_file_is_its_owners_alone(tmp_path: Path):
    for path in provision_keys(tmp_path, IDS):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "judge.jwk").unlink(), "cannot be read"),
        (lambda folder: (folder / "judge.jwk").write_text("{}"), "is not what"),
        (lambda folder: (folder / "judge.jwk").chmod(0o604), "every user may read it"),
        (lambda folder: (folder / "roots.jwks").write_text('{"keys": []}'), "is not what"),
        (lambda folder: (folder / "roots.jwks").write_text("nonsense"), "is not what"),
    ],
)
def test_a_wrong_folder_is_refused_with_what_to_do(tmp_path: Path, spoil, told: str):
    provision_keys(tmp_path, IDS)
    spoil(tmp_path / "judge")
    with pytest.raises(SettingError, match=told) as caught:
        load_provisioned_keys(tmp_path / "judge", "judge", NOW)
    assert str(tmp_path / "judge") in caught.value.detail


def test_anothers_folder_is_no_identity(tmp_path: Path):
    provision_keys(tmp_path, IDS)
    with pytest.raises(SettingError):
        load_provisioned_keys(tmp_path / "coder", "judge", NOW)


def test_a_private_key_is_never_taken_for_a_root(tmp_path: Path):
    provision_keys(tmp_path, IDS)
    secret = json.loads((tmp_path / "judge" / "judge.jwk").read_text())
    (tmp_path / "judge" / "roots.jwks").write_text(json.dumps({"keys": [secret]}))
    with pytest.raises(SettingError):
        load_provisioned_keys(tmp_path / "judge", "judge", NOW)


async def test_services_that_share_a_home_agree_whoever_comes_first(tmp_path: Path):
    shared = settings(home=str(tmp_path / "home"))
    found = await asyncio.gather(*(load_service_keys(shared, name, IDS, NOW) for name in SERVICES))
    keys = dict(zip(SERVICES, found, strict=True))
    root = keys["orchestrator"].root
    assert root is not None
    for name, key in keys.items():
        assert root.services[name].trusted_keys(NOW) == key.own.trusted_keys(NOW)
        assert set(key.roots) == set(root.root.trusted_keys(NOW))
        assert (key.root is None) == (name != "orchestrator")


async def test_a_provisioned_folder_comes_before_the_home(tmp_path: Path):
    provision_keys(tmp_path / "keys", IDS)
    found = await load_service_keys(
        settings(home=str(tmp_path / "home"), keys=str(tmp_path / "keys" / "judge")), "judge", IDS, NOW
    )
    assert found.own.trusted_keys(NOW) == load_provisioned_keys(
        tmp_path / "keys" / "judge", "judge", NOW
    ).own.trusted_keys(NOW)
    assert not (tmp_path / "home").exists()
