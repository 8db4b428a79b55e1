"""Declaring an operation once: id, method, path, scope, types, status, idempotency kind, error codes, direct calls.

The service registers its handler by the declaration, callers take path and types from it, and OpenAPI and the tables of
the documentation are generated from it. The declarations stand in ``public_api``, ``service_operations`` and
``internal_operations``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import msgspec

from octollm.contracts.problems import ERROR_KINDS
from octollm.contracts.services import OperationKind
from octollm.contracts.stream import NDJSON

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
ANY_MEDIA_TYPE = "*/*"
MAX_JSON_BYTES = 1024 * 1024
"""Bytes of a JSON body, unless the declaration says otherwise."""
OPTIONAL_MARK = "?"
"""Before a scope: the operation also works where the caller's authority does not cover this call."""

Method = Literal["GET", "POST", "PUT", "DELETE"]
BodyT = TypeVar("BodyT")
ResponseT = TypeVar("ResponseT")

_ID = re.compile(r"[a-z][a-z_]*([.:][a-z][a-z_]*)?")
_PATH = re.compile(r"(/([A-Za-z0-9._-]+|{[a-z_]+}))+")
_PARAMETER = re.compile(r"{([a-z_]+)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredOperation(Generic[BodyT, ResponseT]):
    """An operation as all sides see it.

    ``body`` and ``response`` are message types, ``bytes`` for the content of a file, and ``NoneType`` for nothing.
    ``scope`` may hold ``{names}`` of path parameters: they become selectors; without a scope no particular one is
    needed. Raises ``ValueError`` for a declaration that contradicts itself.
    """

    id: str
    method: Method
    path: str
    summary: str
    service: str = "orchestrator"
    """The service whose handler does the work."""
    service_path: str = ""
    """The path at that service, where it differs from the public one."""
    scope: str = ""
    kind: OperationKind = "read_only"
    claims_key: bool = True
    """Whether an ``Idempotency-Key`` is claimed and the response stored; false where a repeat is harmless anyway."""
    query: type[msgspec.Struct] | None = None
    """The parameters that the query may hold."""
    body: type[BodyT]
    response: type[ResponseT]
    status: int = 200
    other_statuses: tuple[int, ...] = ()
    """Further statuses that come with the same type of response."""
    error_codes: tuple[str, ...] = ()
    """Besides those that follow from authentication, the body and the kind."""
    media_type: str = JSON
    """The media type of the response."""
    stream_media_type: str = ""
    """The media type of the response when the caller asks for a stream by its ``Accept`` header."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Request headers of this operation, and what each is for."""
    calls: tuple[str, ...] = ()
    """The scopes that it calls directly; :data:`OPTIONAL_MARK` marks those that it can do without."""
    max_body: int = MAX_JSON_BYTES
    """Bytes of a public request body. GET and DELETE take none."""
    cacheable: bool = False
    """Responses carry an ETag (RFC 9110 section 13.1.2)."""
    secret_response: bool = False
    """The response holds a secret that is shown once, or a token."""
    starts_trace: bool = False
    """A call without a trace context starts a trace that is always recorded."""
    anonymous: bool = False
    """No credential is needed."""
    callers: str = ""
    """The services that call it as themselves, with a service token and no capability; ``*`` for any service."""

    def __post_init__(self) -> None:
        problem = self._find_problem()
        if problem:
            raise ValueError(f"The operation {self.id!r} is declared wrongly: {problem}.")

    def _find_problem(self) -> str:
        named = set(self.path_parameters)
        unknown = [code for code in self.error_codes if code not in ERROR_KINDS]
        if not _ID.fullmatch(self.id):
            return "an id is one or two words of a-z and _, such as tasks.read"
        if not _PATH.fullmatch(self.path) or len(named) != len(self.path_parameters):
            return f"{self.path} is no path such as /tasks/{{task_id}}"
        if not set(_PARAMETER.findall(self.scope)) <= named:
            return f"the scope {self.scope} names a parameter that {self.path} does not have"
        if self.method == "GET" and self.kind != "read_only":
            return "a GET is read_only"
        if self.method in ("PUT", "DELETE") and self.kind == "read_only":
            return f"a {self.method} is not read_only"
        if self.callers and (self.scope or self.anonymous):
            return "a service token carries no scope, and is a credential"
        if self.method in ("GET", "DELETE") and self.body is not NoneType:
            return f"a {self.method} has no body"
        if unknown:
            return f"{', '.join(unknown)}: no such error code"
        return "" if self.summary else "it needs a summary"

    @property
    def path_parameters(self) -> tuple[str, ...]:
        """Return the names of the path's parameters, in their order."""
        return tuple(_PARAMETER.findall(self.path))

    @property
    def query_parameters(self) -> tuple[str, ...]:
        """Return the names that the query may hold."""
        return () if self.query is None else self.query.__struct_fields__

    @property
    def body_limit(self) -> int:
        """Return how many bytes of a body are read."""
        return 0 if self.method in ("GET", "DELETE") else self.max_body

    @property
    def is_live_stream(self) -> bool:
        """Return whether a response may last as long as its reader stays: a stream of events, not an answer."""
        return self.method == "GET" and not {EVENT_STREAM, NDJSON}.isdisjoint((self.media_type, self.stream_media_type))

    @property
    def sends_file(self) -> bool:
        """Return whether the request body is the content of a file."""
        return self.body is bytes

    @property
    def returns_file(self) -> bool:
        """Return whether the response body is the content of a file."""
        return self.response is bytes

    def format_path(self, **parameters: str) -> str:
        """Return the path with its parameters, percent-encoded. Raises ``TypeError`` unless all are given."""
        return self._format(self.path, parameters)

    def format_service_path(self, **parameters: str) -> str:
        """Return the path at the service that does the work, as :meth:`format_path` does."""
        return self._format(self.service_path or self.path, parameters)

    def _format(self, path: str, parameters: Mapping[str, str]) -> str:
        if set(parameters) != set(self.path_parameters):
            needed = ", ".join(self.path_parameters) or "no parameters"
            raise TypeError(f"{self.path} needs {needed}, not {', '.join(parameters) or 'none'}.")
        return path.format_map({name: quote(value, safe="") for name, value in parameters.items()})


AnyOperation = DeclaredOperation[Any, Any]


class OperationTable:
    """Declared operations by id. Raises ``ValueError`` for two with one id, or with one method and path on one host.

    With ``one_host`` all operations share one host; otherwise each service has its own.
    """

    def __init__(self, operations: Iterable[AnyOperation], *, one_host: bool) -> None:
        self._by_id: dict[str, AnyOperation] = {}
        endpoints: dict[tuple[str, str, str], str] = {}
        for operation in operations:
            if operation.id in self._by_id:
                raise ValueError(f"Two operations have the id {operation.id!r}.")
            # Parameters of different names match the same paths.
            host = "" if one_host else operation.service
            endpoint = (host, operation.method, _PARAMETER.sub("{}", operation.path))
            if endpoint in endpoints:
                first = endpoints[endpoint]
                raise ValueError(f"{first!r} and {operation.id!r} are both {operation.method} {operation.path}.")
            self._by_id[operation.id] = operation
            endpoints[endpoint] = operation.id

    def __iter__(self) -> Iterator[AnyOperation]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, operation_id: object) -> bool:
        return operation_id in self._by_id

    def __getitem__(self, operation_id: str) -> AnyOperation:
        return self._by_id[operation_id]

    def get(self, operation_id: str) -> AnyOperation | None:
        """Return the operation with an id; ``None`` when there is none."""
        return self._by_id.get(operation_id)
