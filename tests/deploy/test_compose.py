"""The Compose file against the schema of its format, and against the code that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from compose import FILE, MissingVariableError, compose

from octollm.cli.app import load_commands
from octollm.config import PREFIX, SETTING_SPECS, read_settings, unknown_settings
from octollm.contracts.services import BUILT_IN_ARMS, SERVICES
from octollm.installation.services import REDIS_SERVICES

VARIABLES = {"POSTGRES_PASSWORD": "pgsecret", "REDIS_PASSWORD": "redissecret"}
CACHE = Path.home() / ".cache" / "octollm" / "test-tools"
OURS = {name: service for name, service in compose(VARIABLES)["services"].items() if name in SERVICES}
# The memory can do without Redis, and caches in it where there is one.
WITH_REDIS = REDIS_SERVICES | {"memory"}
WITH_SQL = {"orchestrator", "memory", "monitor"}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Return the Compose specification's own JSON schema, which a release of Compose on PyPI carries."""
    wheel = CACHE / "docker_compose-1.29.2-py2.py3-none-any.whl"
    if not wheel.exists():
        command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), "docker-compose==1.29.2"]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            without = pytest.fail if os.environ.get("CI") else pytest.skip
            without(f"the schema of Compose files cannot be fetched: {done.stderr[-300:]}")
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("compose/config/compose_spec.json"))


def test_it_fits_the_schema(schema):
    jsonschema.Draft201909Validator(schema).validate(compose(VARIABLES))


def test_the_schema_would_refuse_a_slip(schema):
    wrong = compose(VARIABLES)
    wrong["services"]["coder"]["comand"] = ["serve", "coder"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft201909Validator(schema).validate(wrong)


@pytest.mark.parametrize("missing", VARIABLES)
def test_a_password_that_is_not_set_is_asked_for(missing):
    with pytest.raises(MissingVariableError, match=missing):
        compose({**VARIABLES, missing: ""})
    assert f"\n{missing}=\n" in (FILE.parent / "env.example").read_text()


def test_every_service_is_served_by_its_name_in_a_cluster():
    assert set(OURS) == set(SERVICES)
    for name, service in OURS.items():
        assert service["command"] == ["serve", name]
        names = {name, *service.get("networks", {}).get("default", {}).get("aliases", [])}
        assert SERVICES[name].host in names


def test_every_command_is_one_of_the_program():
    commands = load_commands().commands
    for name, service in compose(VARIABLES)["services"].items():
        if service["image"] == "octollm" and "entrypoint" not in service:
            group = commands[service["command"][0]]
            assert not hasattr(group, "commands") or service["command"][1] in group.commands, name


def test_every_setting_is_one_that_is_read_and_right():
    for name, service in compose(VARIABLES)["services"].items():
        environment = {key: str(value) for key, value in service.get("environment", {}).items()}
        ours = {key: value for key, value in environment.items() if key.startswith(PREFIX)}
        assert unknown_settings(ours, tuple(SERVICES)) == [], name
        read_settings(ours, tuple(SERVICES))


def test_only_the_gateway_is_reached_from_outside_and_from_this_host_alone_unless_asked():
    published = {
        name: service["ports"] for name, service in compose(VARIABLES)["services"].items() if "ports" in service
    }
    assert published == {"reflex": [f"127.0.0.1:8000:{SERVICES['reflex'].port}"]}


def test_each_is_given_what_it_needs_and_no_more():
    for name, service in OURS.items():
        environment = service["environment"]
        assert ("OCTOLLM_REDIS_URL" in environment) == (name in WITH_REDIS)
        assert ("OCTOLLM_DATABASE_URL" in environment) == (name in WITH_SQL)
        assert ("OCTOLLM_MODEL_API_KEY" in environment) == (name == "models")
        keys = [volume for volume in service["volumes"] if "keys" in volume]
        assert keys == [f"./keys/{name}:/run/octollm/keys:ro"]
        assert environment["OCTOLLM_KEYS"] == "/run/octollm/keys"
    for arm in BUILT_IN_ARMS:
        text = json.dumps(OURS[arm])
        assert not any(secret in text for secret in VARIABLES.values())


def test_each_may_do_no_more_on_its_host_than_it_must():
    for name, service in OURS.items():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert "no-new-privileges:true" in service["security_opt"]
        assert not any("seccomp=unconfined" in option for option in service["security_opt"])
        assert any("seccomp=" in option for option in service["security_opt"]) == (name == "executor")


def test_the_executor_has_a_seccomp_profile_of_its_own():
    (option,) = [each for each in OURS["executor"]["security_opt"] if each.startswith("seccomp=")]
    profile = json.loads((FILE.parent / option.removeprefix("seccomp=")).read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = {name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    assert not allowed & {
        "bpf",
        "init_module",
        "kexec_load",
        "keyctl",
        "open_by_handle_at",
        "perf_event_open",
        "ptrace",
    }


def test_a_container_is_given_longer_to_stop_than_a_service_takes_to_drain():
    drain = float(SETTING_SPECS["shutdown_grace"].default)
    for service in OURS.values():
        assert float(service["stop_grace_period"].removesuffix("s")) > drain
