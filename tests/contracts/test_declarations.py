"""A declaration that contradicts itself, or another one, is refused when it is made."""

from __future__ import annotations

from types import NoneType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import compile_path

from octollm.contracts.declarations import AnyOperation, DeclaredOperation, OperationTable
from octollm.contracts.public_api import PUBLIC_OPERATIONS
from octollm.contracts.service_operations import SERVICE_OPERATIONS, calls_of, route_of
from octollm.contracts.services import BUILT_IN_ARMS, SERVICES, service_of
from octollm.contracts.task_operations import READ_TASK, TASK_ARTIFACT


class Note(msgspec.Struct):
    text: str


def declare(**changes: Any) -> AnyOperation:
    values: dict[str, Any] = {
        "id": "notes.read",
        "method": "GET",
        "path": "/notes/{note_id}",
        "summary": "Read a note.",
        "body": NoneType,
        "response": Note,
    }
    return DeclaredOperation(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"id": "Notes.Read"}, "an id is"),
        ({"id": "notes.read.all"}, "an id is"),
        ({"id": ""}, "an id is"),
        ({"path": "notes"}, "no path"),
        ({"path": "/"}, "no path"),
        ({"path": "/notes/"}, "no path"),
        ({"path": "/notes/{note_id}/{note_id}"}, "no path"),
        ({"path": "/notes?limit"}, "no path"),
        ({"scope": "notes:read:{id}"}, "does not have"),
        ({"kind": "idempotent"}, "a GET is read_only"),
        ({"method": "DELETE"}, "a DELETE is not read_only"),
        ({"method": "PUT"}, "a PUT is not read_only"),
        ({"body": Note}, "a GET has no body"),
        ({"method": "DELETE", "kind": "idempotent", "body": Note}, "a DELETE has no body"),
        ({"error_codes": ("not_found", "no_such_code")}, "no_such_code: no such error code"),
        ({"callers": "memory", "scope": "notes:read"}, "a service token carries no scope"),
        ({"callers": "*", "anonymous": True}, "a service token carries no scope"),
        ({"summary": ""}, "it needs a summary"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(changes: dict[str, Any], text: str) -> None:
    assert declare().id == "notes.read"
    with pytest.raises(ValueError, match=text):
        declare(**changes)


def test_two_operations_with_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Two operations have the id 'notes.read'"):
        OperationTable([declare(), declare(path="/other")], one_host=True)


@pytest.mark.parametrize("path", ["/notes/{note_id}", "/notes/{other}"])
def test_two_operations_with_one_method_and_path_are_refused(path: str) -> None:
    second = declare(id="notes.show", path=path)
    with pytest.raises(ValueError, match=r"'notes.read' and 'notes.show' are both GET"):
        OperationTable([declare(), second], one_host=True)
    with pytest.raises(ValueError, match="are both GET"):
        OperationTable([declare(), second], one_host=False)


def test_services_have_paths_of_their_own() -> None:
    table = OperationTable([declare(), declare(id="notes.show", service="memory")], one_host=False)
    assert [operation.id for operation in table] == ["notes.read", "notes.show"]
    assert "notes.show" in table
    assert table["notes.show"].service == "memory"
    assert table.get("notes.write") is None
    with pytest.raises(ValueError, match="are both GET"):
        OperationTable(table, one_host=True)


def test_one_path_may_have_several_methods() -> None:
    other = declare(id="notes.remove", method="DELETE", kind="idempotent")
    assert len(OperationTable([declare(), other], one_host=True)) == 2


@given(st.text(min_size=1), st.text(min_size=1))
def test_a_parameter_stays_one_segment_of_the_path(task_id: str, digest: str) -> None:
    path = TASK_ARTIFACT.format_path(task_id=task_id, digest=digest)
    assert path.isascii()
    assert path.count("/") == TASK_ARTIFACT.path.count("/")
    assert not set(path) & set("?#{} \n")


@pytest.mark.parametrize("parameters", [{}, {"task": "t"}, {"task_id": "t", "digest": "d"}])
def test_a_path_needs_its_parameters_and_no_others(parameters: dict[str, str]) -> None:
    assert READ_TASK.format_path(task_id="a/b") == "/tasks/a%2Fb"
    with pytest.raises(TypeError, match="needs task_id"):
        READ_TASK.format_path(**parameters)


@pytest.mark.parametrize("declared", [*PUBLIC_OPERATIONS, *SERVICE_OPERATIONS], ids=lambda declared: declared.id)
def test_a_declared_scope_belongs_to_the_service_that_does_the_work(declared: AnyOperation) -> None:
    compile_path(declared.path)
    if declared.scope and declared.service != "reflex":
        assert service_of(declared.scope.split(":")[0]) == declared.service
    assert declared.service in SERVICES


def test_whatever_answers_with_a_secret_is_known_as_such() -> None:
    def members(kind: Any) -> set[str]:
        return set(getattr(kind, "__struct_fields__", ()))

    secrets = {declared.id for declared in PUBLIC_OPERATIONS if declared.secret_response}
    named = {declared.id for declared in PUBLIC_OPERATIONS if members(declared.response) & {"secret", "access_token"}}
    assert secrets == named
    webhooks = {"hooks.create", "hooks.rotate", "webhooks.create", "webhooks.rotate"}
    assert secrets == {*webhooks, "keys.create", "joins.create", "tokens.make"}


def test_every_direct_call_is_declared_and_marked_with_its_need() -> None:
    for declared in SERVICE_OPERATIONS:
        for call in declared.calls:
            assert call.removeprefix("?") in SERVICE_OPERATIONS, declared.id
    assert calls_of("judge") == ("executor:run", "files:read", "models:chat")
    assert calls_of("memory") == ("models:embeddings",)
    assert all(f"{arm}:execute" in SERVICE_OPERATIONS for arm in BUILT_IN_ARMS)


def test_an_operation_that_nobody_declared_is_a_post_to_its_name() -> None:
    route = route_of("translator", "translate")
    assert (route.method, route.path, route.kind) == ("POST", "/translate", "idempotent")
    assert route_of("files", "read").path == "/files/{digest}"
    assert route_of("judge", "validate").kind == "read_only"
