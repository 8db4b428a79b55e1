"""The built-in arms are written with the public API; what else they import is named here, with the reason."""

import ast
import importlib
from pathlib import Path

import pytest

import octollm
from octollm.arm import references
from octollm.contracts.service_operations import SERVICE_OPERATIONS

ARMS = Path(octollm.__file__).parent / "services" / "arms"
EXCEPTIONS = {
    # Contracts: bodies and answers of the built-in operations, and rules about files that clients share.
    "octollm.contracts.media_types",
    "octollm.contracts.operations",
    "octollm.contracts.output_schema",
    "octollm.contracts.service_operations",
    "octollm.contracts.services",
    "octollm.contracts.stream",
    "octollm.contracts.task",
    # Reading of files and tables, without I/O.
    "octollm.documents",
    "octollm.documents.dates",
    "octollm.documents.decoding",
    "octollm.documents.detection",
    "octollm.documents.layout",
    "octollm.documents.model",
    "octollm.documents.numbers",
    "octollm.documents.reading",
    "octollm.documents.tables",
    # Rules of words, without I/O.
    "octollm.text.index_terms",
    "octollm.text.language",
    "octollm.text.limits",
    "octollm.text.intent",
    "octollm.text.lexical",
    "octollm.text.passages",
    "octollm.text.question_terms",
    # Composition: an arm becomes a service of the installation.
    "octollm.arm",
    "octollm.arm.completion",
    "octollm.config",
    "octollm.errors",
    "octollm.rpc.service",
    # The executor watches its sandbox and measures its runs.
    "octollm.clock",
    "octollm.limiter",
    "octollm.lru",
    "octollm.rpc.health",
    "octollm.telemetry",
    # The executor calls external servers, with the guard against request forgery.
    "octollm.resilience",
    "octollm.rpc.egress",
    "octollm.rpc.tls",
}
MODULES = sorted(path.relative_to(ARMS).as_posix() for path in ARMS.rglob("*.py"))


def imports(module: str) -> list[tuple[str, str]]:
    """Return (module, name) of what a module of the arms imports from OctoLLM, its own package apart."""
    tree = ast.parse((ARMS / module).read_text())
    found = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "octollm"
        for alias in node.names
    ]
    found += [
        (alias.name, "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.partition(".")[0] == "octollm"
    ]
    return [(source, name) for source, name in found if not source.startswith("octollm.services.arms")]


@pytest.mark.parametrize("module", MODULES)
def test_an_arm_imports_the_public_api(module):
    assert {source for source, _ in imports(module) if source != "octollm"} <= EXCEPTIONS
    # A public name comes from where an author of arms has it.
    assert [(source, name) for source, name in imports(module) if source != "octollm" and name in octollm.__all__] == []


def test_every_exception_is_needed():
    assert {source for module in MODULES for source, _ in imports(module)} - {"octollm"} == EXCEPTIONS


def test_every_name_that_is_imported_is_there():
    for module in MODULES:
        for source, name in imports(module):
            assert not name or hasattr(importlib.import_module(source), name), (module, source, name)


def test_a_reference_is_what_the_operation_is_declared_as():
    services = {
        name: vars(getattr(references, name))
        for name in ("coder", "executor", "judge", "memory", "planner", "retriever")
    }
    named = {
        reference.scope: (reference.body, reference.answer)
        for members in services.values()
        for reference in members.values()
        if isinstance(reference, octollm.OperationReference)
    }
    declared = {operation.id: (operation.body, operation.response) for operation in SERVICE_OPERATIONS}
    assert len(named) >= 12
    assert {scope: declared[scope] for scope in named} == named
