"""The image: its Dockerfile is carried out in a clean Debian, and what comes out serves as its user."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from clean_root import CleanRoot
from dockerfile import Stage, read_dockerfile

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "Dockerfile").read_text()
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def build_context(folder: Path) -> Path:
    """Return the build context: what .dockerignore lets through."""
    first, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    assert (first, rules[-1]) == ("*", "**/__pycache__")
    for name in [rule.removeprefix("!") for rule in rules if rule.startswith("!")]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_stage(stage: Stage, root: CleanRoot, context: Path, made: dict[str, CleanRoot]) -> None:
    """Carry out a stage's steps as a builder would."""
    environment = {"PATH": PATH, "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
    folder, user = "/", "0"
    for step in stage.steps:
        if step.word == "ENV":
            environment |= dict(part.split("=", 1) for part in step.words)
        elif step.word == "RUN":
            root.run("/bin/sh", "-c", step.text, environment=environment, user=user, folder=folder)
        elif step.word == "WORKDIR":
            folder = step.text
            (root.path / folder[1:]).mkdir(parents=True, exist_ok=True)
        elif step.word == "USER":
            user = step.text
        elif step.word == "COPY":
            copy(step.words, root, folder, context, made)


def copy(words: list[str], root: CleanRoot, folder: str, context: Path, made: dict[str, CleanRoot]) -> None:
    source = context
    if words[0].startswith("--from="):
        source = made[words.pop(0).removeprefix("--from=")].path
    *names, target = words
    place = root.path / os.path.normpath(f"{folder}/{target}" if target[0] != "/" else target).lstrip("/")
    for name in names:
        found = source / name.lstrip("/")
        if found.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            # Hard links: the files of a stage are finished when another takes them.
            subprocess.run(["cp", "-a", "--link", f"{found}/.", str(place)], check=True, timeout=120)
        else:
            goal = place / found.name if target.endswith("/") else place
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, goal)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Build the image; return its root and last stage."""
    folder = tmp_path_factory.mktemp("image")
    context = build_context(folder / "context")
    stages = read_dockerfile(TEXT)
    made: dict[str, CleanRoot] = {}
    for stage in stages:
        (folder / stage.name).mkdir()
        made[stage.name] = CleanRoot(folder / stage.name)
        run_stage(stage, made[stage.name], context, made)
    yield made[stages[-1].name], stages[-1]
    shutil.rmtree(folder, ignore_errors=True)


def environment_of(stage: Stage, **more: str) -> dict[str, str]:
    return {"HOME": "/var/lib/octollm", **stage.environment, **more}


@pytest.mark.timeout(900)
def test_the_image_runs_the_command_as_a_user_without_privileges(image):
    root, stage = image
    said = root.run(
        *stage.last("ENTRYPOINT").words,
        "--version",
        environment=environment_of(stage),
        user=stage.last("USER").text,
        folder=stage.last("WORKDIR").text,
    )
    assert said.startswith("octollm ")
    assert int(stage.last("USER").text) > 0


@pytest.mark.timeout(300)
def test_the_image_has_all_that_a_spread_installation_needs(image):
    root, stage = image
    said = root.run(
        "python3",
        "-c",
        "import asyncpg, octollm; from pathlib import Path; p = Path(octollm.__file__).parent;"
        "print((p / 'py.typed').exists(), (p / 'services/reflex/page/index.html').exists(), p)",
        environment=environment_of(stage),
        user=stage.last("USER").text,
    )
    assert said.split()[:2] == ["True", "True"]
    assert said.split()[2].startswith("/opt/octollm/")
    assert (root.path / "usr/bin/bwrap").exists()


APPLY_PROFILE = (ROOT / "tests" / "support" / "seccomp_profile.py").read_text()
PROFILE = ROOT / "deploy" / "helm" / "octollm" / "files" / "executor-seccomp.json"
RUN_IN_SANDBOX = """
import asyncio
from pathlib import Path
from octollm.services.arms.executor.selection import select_sandbox
from octollm.services.arms.executor.wasi import find_wasi_python
cache = Path("/tmp/tools")
print(asyncio.run(select_sandbox("bubblewrap", cache_dir=cache, fetch=False)).name, find_wasi_python(cache))
"""


def run_as_a_container(image, *words: str) -> str:
    """Run a command as an engine runs the executor: with its profile, without capabilities, /proc/sys read-only."""
    root, stage = image
    become = "setpriv --no-new-privs --reuid=10001 --regid=10001 --clear-groups --bounding-set=-all --inh-caps=-all"
    return root.run(
        *(
            "/bin/sh",
            "-ec",
            "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; " + become + ' "$@"',
        ),
        *("sh", "/usr/bin/python3", "-c", APPLY_PROFILE, PROFILE.read_text(), *words),
        environment=environment_of(stage),
    )


@pytest.mark.timeout(300)
def test_a_container_has_both_sandboxes(image):
    found = run_as_a_container(image, "/opt/octollm/bin/python", "-c", RUN_IN_SANDBOX).split()
    assert found == ["bubblewrap", "/usr/local/share/octollm/python-3.12.0.wasm"]


@pytest.mark.timeout(300)
def test_the_executors_profile_refuses_what_no_sandbox_needs(image):
    # ptrace, bpf, keyctl, perf_event_open and kexec_load, by their numbers on x86_64
    calls = "101, 321, 250, 298, 246"
    attempts = f"""import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print([libc.syscall(number, 0, 0, 0, 0, 0) and ctypes.get_errno() for number in ({calls})])"""
    assert run_as_a_container(image, "/usr/bin/python3", "-c", attempts) == "[1, 1, 1, 1, 1]\n"


def test_no_secret_and_no_test_gets_into_the_image(tmp_path):
    context = build_context(tmp_path)
    names = {path.name for path in context.iterdir()}
    assert names == {"pyproject.toml", "README.md", "LICENSE", "src"}


def test_the_reader_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="ONBUILD"):
        read_dockerfile("FROM x\nONBUILD RUN true")
