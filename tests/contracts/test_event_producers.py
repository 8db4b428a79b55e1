"""Catalogue × producers × subscribers: what is declared is emitted, what is emitted or followed is declared."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import octollm
from octollm.contracts.events import EVENT_CATALOGUE, channel_of
from octollm.contracts.services import SERVICES

SOURCE = Path(octollm.__file__).parent
EMITTING = {"EventDraft", "append", "_append_event", "append_event", "change", "emit", "emit_lifecycle", "publish"}
"""What emits an event when it is called with its type as an argument."""


@functools.cache
def sources() -> list[tuple[str, ast.Module]]:
    """Return the modules whose text has a type or a channel: parsing all of them would take seconds."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    words = ("events:", *EVENT_CATALOGUE)
    return [
        (path.relative_to(SOURCE).as_posix(), ast.parse(text))
        for path, text in texts.items()
        if any(word in text for word in words)
    ]


def strings(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value


def service_of(path: str) -> str:
    """Return the service that runs a module; ``*`` for one that every service runs."""
    for name in SERVICES:
        if path.startswith((f"services/{name}/", f"services/arms/{name}/")):
            return name
    # Only the orchestrator has the log and runs tasks.
    return "orchestrator" if path.startswith(("tasks/", "events/log.py")) else "*"


def named_strings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each constant of a module that is a string."""
    for each in tree.body:
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
            for text in strings(each.value) if isinstance(each.value, ast.Constant) else ():
                yield each.targets[0].id, text


def changes_of(tree: ast.Module) -> Iterator[str]:
    """Yield the event types that changes of tasks have, each in a pair with its data."""
    for each in ast.walk(tree):
        match each:
            case ast.Tuple(elts=[ast.Constant(value=str(name)), ast.Dict() | ast.Name()]) if name in EVENT_CATALOGUE:
                yield name


@functools.cache
def emitted() -> dict[str, set[str]]:
    """Return the event types that calls in the source emit, each with the services that do."""
    found: dict[str, set[str]] = {}
    for path, tree in sources():
        constants = dict(named_strings(tree))
        for name in changes_of(tree) if path.startswith("tasks/") else ():
            found.setdefault(name, set()).add(service_of(path))
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute | ast.Name):
                continue
            if (call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id) not in EMITTING:
                continue
            # Only the type itself, or a choice of two: members of the data may look like types.
            for argument in call.args[:4]:
                if isinstance(argument, ast.Constant | ast.IfExp | ast.Name):
                    named = {constants.get(argument.id, "")} if isinstance(argument, ast.Name) else set()
                    for name in (named | set(strings(argument))) & set(EVENT_CATALOGUE):
                        found.setdefault(name, set()).add(service_of(path))
    return found


def test_every_declared_type_is_emitted() -> None:
    assert set(EVENT_CATALOGUE) == set(emitted())


def test_a_type_is_emitted_by_its_declared_producers_only() -> None:
    for name, services in emitted().items():
        assert services == set(EVENT_CATALOGUE[name].producers), name


def test_every_channel_that_the_source_follows_is_declared() -> None:
    channels = [channel_of(name) for name in EVENT_CATALOGUE]
    patterns = {
        text for path, tree in sources() if path != "contracts/events.py" for text in strings(tree) if is_pattern(text)
    }
    assert "events:*" in patterns
    for pattern in patterns:
        assert any(fnmatchcase(channel, pattern) for channel in channels), pattern


def is_pattern(text: str) -> bool:
    # `events:read` is a scope.
    return text.startswith("events:") and ("*" in text or text.count(":") == 2) and not set(" {`\n") & set(text)


def test_every_producer_is_a_service() -> None:
    for kind in EVENT_CATALOGUE.values():
        assert kind.producers
        assert set(kind.producers) <= {"*", *SERVICES}
