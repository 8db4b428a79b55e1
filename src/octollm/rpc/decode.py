"""Reading a body: bytes to a typed value, with the place of the fault when it does not fit."""

from __future__ import annotations

import re
from typing import Any, TypeVar, cast, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec

from octollm.errors import FieldError, OctoError
from octollm.rpc.shapes import decode_model, escape_pointer, pydantic_faults

T = TypeVar("T")

_PATH = re.compile(r" - at `(?:key in )?\$([^`]*)`$")
_PART = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_DEPTH = 12
_MAX_PARAMETERS = 100


def decode(data: bytes, kind: type[T], *, strict: bool = False) -> T:
    """Read JSON ``data`` as ``kind``.

    Raises ``invalid_json`` or ``invalid_body`` with a JSON Pointer (RFC 6901) to the fault; with ``strict``
    (the public door) also ``unknown_field``. Between services unknown members are ignored, so that two
    versions can run together.
    """
    try:
        value = msgspec.json.decode(data, type=kind, dec_hook=decode_model)
    except msgspec.ValidationError as error:
        text = str(error)
        at = _pointer(text)
        raise OctoError(
            "The body does not fit its schema.",
            code="invalid_body",
            field_errors=pydantic_faults(error.__cause__, at) or (FieldError(at, _fault_text(text)),),
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OctoError(
            "The body is not valid JSON.", code="invalid_json", field_errors=(FieldError("", str(error)),)
        ) from error
    if strict:
        unknown = list(_unknown_fields(msgspec.json.decode(data), kind, "", 0))
        if unknown:
            raise OctoError(
                "The body has a field that is not known here.",
                code="unknown_field",
                field_errors=tuple(FieldError(pointer, "unknown field") for pointer in unknown[:20]),
            )
    return value


def decode_query(text: bytes, kind: type[T]) -> T:
    """Read the query of a URL as ``kind``; of a name that comes twice the last counts, others are ignored.

    Raises ``invalid_parameter`` with the name.
    """
    try:
        found = dict(parse_qsl(text.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_PARAMETERS))
    except ValueError as error:
        raise OctoError(f"The query may have {_MAX_PARAMETERS} parameters.", code="invalid_parameter") from error
    try:
        return msgspec.convert(found, kind, strict=False)
    except msgspec.ValidationError as error:
        name = _pointer(str(error)).removeprefix("/")
        where = f"The query parameter {name} is wrong" if name else "The query is wrong"
        raise OctoError(f"{where}: {_fault_text(str(error))}.", code="invalid_parameter") from error


def _fault_text(text: str) -> str:
    return _PATH.sub("", text)


def _pointer(text: str) -> str:
    match = _PATH.search(text)
    if match is None:
        return ""
    parts = [name or index for name, index in _PART.findall(match[1])]
    return "".join("/" + escape_pointer(part) for part in parts)


def _unknown_fields(raw: Any, kind: Any, at: str, depth: int) -> Any:
    """Yield a pointer for each member of ``raw`` that the Structs in ``kind`` do not have."""
    if depth > _DEPTH:
        return
    struct = _struct_in(kind)
    if struct is not None and isinstance(raw, dict):
        known = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
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


def _struct_in(kind: Any) -> Any:
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate if get_origin(kind) not in (tuple, list, dict) else None
    return None
