"""Bodies: read within bounds, decoded to msgspec or Pydantic types, encoded, and described as JSON Schema.

A fault of a body is reported with a JSON Pointer (RFC 6901). Pydantic is recognised by its methods and never imported.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard, TypeVar, cast, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from octollm.clock import IdGenerator
from octollm.context import REQUEST_ID
from octollm.errors import FieldError, OctoError, escape_pointer, map_exceptions, parse_field_error


def is_pydantic(kind: object) -> TypeGuard[type[Any]]:
    """Say whether ``kind`` is a Pydantic model."""
    return isinstance(kind, type) and hasattr(kind, "model_validate") and hasattr(kind, "model_json_schema")


def encode(value: object) -> bytes:
    """Return ``value`` as JSON. Raises ``TypeError`` for a type that has no form in JSON."""
    return msgspec.json.encode(value, enc_hook=_encode_model)


def convert(value: object, type_: Any) -> Any:
    """Convert JSON's builtins to ``type_``. Raises ``msgspec.ValidationError``."""
    return msgspec.convert(value, type_, dec_hook=decode_model)


def decode_model(kind: type[Any], value: object) -> Any:
    """Convert JSON's builtins to a Pydantic model: msgspec's ``dec_hook``."""
    if is_pydantic(kind):
        # From JSON, where a text may stand for a date even in a strict model.
        return kind.model_validate_json(msgspec.json.encode(value))
    if isinstance(value, kind):  # ``object`` is any JSON
        return value
    raise NotImplementedError(kind)


def _encode_model(value: Any) -> object:
    if not is_pydantic(cast("object", type(value))):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return value.model_dump(mode="json", by_alias=True)


def json_schemas(kinds: Iterable[object]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a JSON schema for each of ``kinds``, and the components that they refer to (OpenAPI 3.1).

    Raises ``TypeError`` for a type that has none.
    """
    definitions: dict[str, Any] = {}

    def schema_of(kind: type[Any]) -> dict[str, Any]:
        if kind is object:
            return {"description": "Any JSON."}  # an empty schema would count as none
        if not is_pydantic(kind):
            raise NotImplementedError(kind)
        schema: dict[str, Any] = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        definitions.update(schema.pop("$defs", {}))
        return schema

    schemas, components = msgspec.json.schema_components(
        list(kinds), schema_hook=schema_of, ref_template="#/components/schemas/{name}"
    )
    return list(schemas), {**definitions, **components}


def pydantic_faults(error: BaseException | None, at: str) -> tuple[FieldError, ...]:
    """Return the faults of a Pydantic error in a value at the pointer ``at``; none for another error."""
    invalid: Any = error
    if not (hasattr(invalid, "errors") and hasattr(invalid, "error_count")):
        return ()
    return tuple(
        FieldError(at + "".join("/" + escape_pointer(str(part)) for part in fault["loc"]), fault["msg"])
        for fault in invalid.errors(include_url=False, include_context=False, include_input=False)[:20]
    )


T = TypeVar("T")

_DEPTH = 12
_MAX_PARAMETERS = 100


def decode(data: bytes, kind: type[T], *, strict: bool = False) -> T:
    """Read JSON ``data`` as ``kind``.

    Raises ``invalid_json`` or ``invalid_body`` with a JSON Pointer (RFC 6901) to the fault; with ``strict``
    (the public API) also ``unknown_field``. Between services unknown members are ignored, so that two
    versions can run together.
    """
    if strict:
        return decode_strictly(parse_json(data), kind)
    # Not map_exceptions: this is on the path of every call, where a context manager costs more than some bodies.
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=decode_model)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _body_error(error) from error


def parse_json(data: bytes) -> Any:
    """Read JSON ``data`` as builtins. Raises as :func:`decode` does."""
    with map_exceptions(_body_error, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(data)


def decode_strictly(document: Any, kind: type[T]) -> T:
    """Convert parsed JSON to ``kind``. Raises as :func:`decode` does, with ``unknown_field`` for unknown members.

    ``kind`` has no member of the type ``msgspec.Raw``: the text of the JSON is gone.
    """
    with map_exceptions(_body_error, msgspec.ValidationError):
        value = msgspec.convert(document, kind, str_keys=True, dec_hook=decode_model)
    unknown = list(_unknown_fields(document, kind, "", 0))
    if unknown:
        raise OctoError(
            "The body has an unknown member here.",
            code="unknown_field",
            field_errors=tuple(FieldError(pointer, "unknown field") for pointer in unknown[:20]),
        )
    return value


def _body_error(error: Exception) -> OctoError:
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return OctoError("The body is not valid JSON.", code="invalid_json", field_errors=(FieldError("", text),))
    fault = parse_field_error(text)
    return OctoError(
        "The body does not match its schema.",
        code="invalid_body",
        field_errors=pydantic_faults(error.__cause__, fault.pointer) or (fault,),
    )


def decode_query(text: bytes, kind: type[T]) -> T:
    """Read the query of a URL as ``kind``. Of a repeated name the last counts; unknown names are ignored.

    Raises ``invalid_parameter`` with the name.
    """
    try:
        parameters = dict(parse_qsl(text.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_PARAMETERS))
    except ValueError as error:
        raise OctoError(f"The query may have {_MAX_PARAMETERS} parameters.", code="invalid_parameter") from error
    try:
        return msgspec.convert(parameters, kind, strict=False)
    except msgspec.ValidationError as error:
        fault = parse_field_error(str(error))
        name = fault.pointer.removeprefix("/")
        where = f"The query parameter {name} is wrong" if name else "The query is wrong"
        raise OctoError(f"{where}: {fault.detail}.", code="invalid_parameter") from error


def _unknown_fields(raw: Any, kind: Any, at: str, depth: int) -> Any:
    """Yield a pointer for each member of ``raw`` that the Structs in ``kind`` do not have."""
    if depth > _DEPTH:
        return
    struct = _struct_in(kind)
    if struct is not None and isinstance(raw, dict):
        known = _fields_of(struct)
        members = cast("dict[str, Any]", raw)
        for name, item in members.items():
            pointer = f"{at}/{escape_pointer(str(name))}"
            if name not in known:
                yield pointer
            else:
                yield from _unknown_fields(item, known[name], pointer, depth + 1)
    elif isinstance(raw, list):
        origin = get_origin(kind)
        if origin in (tuple, list) and get_args(kind):
            items = cast("list[Any]", raw)
            for index, item in enumerate(items):
                yield from _unknown_fields(item, get_args(kind)[0], f"{at}/{index}", depth + 1)


@functools.lru_cache(maxsize=1024)
def _fields_of(struct: type[msgspec.Struct]) -> Mapping[str, Any]:
    """Return the types of a struct's members. msgspec resolves the annotations anew each time, which takes a while."""
    return {field.encode_name: field.type for field in msgspec.structs.fields(struct)}


def _struct_in(kind: Any) -> Any:
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate if get_origin(kind) not in (tuple, list, dict) else None
    return None


BODY_SECONDS = 60.0
"""How long the body of a call may take to arrive."""


async def read_body(scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """Return the body of a request, as its parts arrive. Raises ``body_too_large`` or ``request_timeout``."""
    length = headers.get(b"content-length")
    if length is None and b"transfer-encoding" not in headers and scope["http_version"] in ("1.0", "1.1"):
        return b""  # RFC 9112 section 6.3: without either header there is no body
    # An announced length is refused before any of the body is buffered.
    if length is not None and length.isdigit() and int(length) > limit:
        raise body_too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                # Chunks and HTTP/2 announce no length, so the limit is checked as the bytes come too.
                if size > limit:
                    raise body_too_large(limit)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise OctoError(f"The body did not arrive in {BODY_SECONDS:g} s.", code="request_timeout") from None


def body_too_large(limit: int) -> OctoError:
    """Return the error for a body of more than ``limit`` bytes."""
    return OctoError(f"The body may have at most {limit} bytes.", code="body_too_large")


def header_text(value: bytes | None) -> str | None:
    """Return the text of a header, ``None`` for none."""
    return None if value is None else value.decode("latin-1")


def id_or_new(value: bytes | None, ids: IdGenerator, prefix: str) -> str:
    """Return the id that the caller sent, or a new one with ``prefix`` if it is missing or malformed."""
    text = header_text(value)
    return text if text and REQUEST_ID.fullmatch(text) else prefix + ids.hex()
