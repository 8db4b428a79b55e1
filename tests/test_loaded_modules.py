"""What a process loads: a service starts faster and smaller without the libraries that only others need."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import msgspec
import pytest

SQL = {"sqlalchemy", "alembic", "aiosqlite", "asyncpg"}
DNS = {"dns"}
REDIS = {"redis", "burner_redis"}
SERVER = {"starlette", "uvicorn"}
AGENTS = {"pydantic", "pydantic_ai", "openai"}

MUST_NOT_LOAD: dict[str, set[str]] = {
    "octollm.cli.app": SQL | DNS | REDIS | SERVER | AGENTS,
    "octollm.client": SQL | DNS | REDIS | SERVER | AGENTS,
    "octollm.arm": SQL | DNS | REDIS | AGENTS,
    "octollm.cli.serve": SQL | DNS | REDIS | AGENTS,
    "octollm.installation.services": SQL | DNS | REDIS | AGENTS,
    "octollm.services.arms.planner.service": SQL | DNS | REDIS,
    "octollm.services.arms.executor.service": SQL | DNS | REDIS,
    "octollm.services.arms.coder.service": SQL | DNS | REDIS,
    "octollm.services.arms.judge.service": SQL | DNS | REDIS,
    "octollm.services.arms.retriever.service": SQL | DNS | REDIS,
    "octollm.services.models.service": SQL | DNS | REDIS,
    "octollm.services.reflex.service": SQL | DNS,
    "octollm.services.orchestrator.service": DNS,
    "octollm.services.memory.service": DNS,
    "octollm.services.monitor.service": DNS,
}
"""One process imports these in order, so that none may load what a later one must not."""

LAZY_PACKAGES = ("octollm", "octollm.events", "octollm.storage")


def test_no_process_loads_what_it_does_not_need() -> None:
    code = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    loaded[name] = list(sys.modules)\n"
        "print(json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code, *MUST_NOT_LOAD], capture_output=True, text=True, check=True)
    loaded = msgspec.json.decode(done.stdout, type=dict[str, set[str]])
    assert {name: found for name, bad in MUST_NOT_LOAD.items() if (found := bad & loaded[name])} == {}


@pytest.mark.parametrize("package", LAZY_PACKAGES)
def test_a_lazy_package_exports_what_a_type_checker_sees(package: str) -> None:
    module = import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    seen = {
        alias.name: str(node.module)
        for condition in tree.body
        if isinstance(condition, ast.If) and ast.unparse(condition.test) == "TYPE_CHECKING"
        for node in condition.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen.keys() == set(module.__all__) - {"__version__"}
    assert seen.keys() <= set(dir(module))
    for name, source in seen.items():
        assert getattr(module, name) is getattr(import_module(source), name)
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'Missing'; it offers"):
        _ = module.Missing
