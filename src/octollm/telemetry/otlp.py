"""OTLP 1.x in its JSON encoding: spans to and from an ExportTraceServiceRequest.

The structs are the part of the message that is used; unknown members are ignored, as the specification demands.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from octollm.context import TraceContext
from octollm.masking import mask_text
from octollm.telemetry.spans import Span, SpanKind, SpanValue

MAX_SPANS = 2048
"""The most spans in one request."""
MAX_TEXT = 8192
"""The most characters of one text; longer ones are truncated when they are sent."""
MAX_NAME = 255

_KINDS: tuple[SpanKind, ...] = ("internal", "internal", "server", "client", "producer", "consumer")
_KIND_NUMBERS: dict[SpanKind, int] = {"internal": 1, "server": 2, "client": 3, "producer": 4, "consumer": 5}
_ERROR = 2
_ERROR_TYPE = "error.type"
"""The attribute of the semantic conventions for an error code."""
_SAMPLED = 1

_TraceId = Annotated[str, Meta(pattern=r"\A(?!0{32}\Z)[0-9a-fA-F]{32}\Z")]
_SpanId = Annotated[str, Meta(pattern=r"\A(?!0{16}\Z)[0-9a-fA-F]{16}\Z")]
_Parent = Annotated[str, Meta(pattern=r"\A([0-9a-fA-F]{16})?\Z")]
_Nanos = Annotated[str, Meta(pattern=r"\A[0-9]{1,19}\Z")] | Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Int64 = Annotated[str, Meta(pattern=r"\A-?[0-9]{1,19}\Z")] | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Text = Annotated[str, Meta(max_length=MAX_TEXT)]
_Name = Annotated[str, Meta(max_length=MAX_NAME)]


class _OtlpStruct(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel", gc=False):
    """A base without garbage collection: requests have thousands of these structs and no reference cycles."""


class AnyValue(_OtlpStruct, frozen=True):
    """A value; exactly one member is set, which gives its type."""

    string_value: _Text | None = None
    bool_value: bool | None = None
    int_value: _Int64 | None = None
    double_value: float | None = None
    array_value: ArrayValue | None = None


class ArrayValue(_OtlpStruct, frozen=True):
    """A list of values."""

    values: Annotated[tuple[AnyValue, ...], Meta(max_length=64)] = ()


class KeyValue(_OtlpStruct, frozen=True):
    """An attribute."""

    key: _Name
    value: AnyValue = AnyValue()


_Attributes = Annotated[tuple[KeyValue, ...], Meta(max_length=128)]


class OtlpStatus(_OtlpStruct, frozen=True):
    """The status of a span; ``code`` 2 is an error."""

    message: _Text = ""
    code: int = 0


class OtlpSpan(_OtlpStruct, frozen=True):
    """A span. Its events and links are ignored."""

    trace_id: _TraceId
    span_id: _SpanId
    name: _Name
    start_time_unix_nano: _Nanos
    end_time_unix_nano: _Nanos
    parent_span_id: _Parent = ""
    kind: Annotated[int, Meta(ge=0, le=5)] = 0
    attributes: _Attributes = ()
    status: OtlpStatus = OtlpStatus()
    flags: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0


class InstrumentationScope(_OtlpStruct, frozen=True):
    """The library that recorded the spans."""

    name: _Name = ""
    version: _Name = ""


class ScopeSpans(_OtlpStruct, frozen=True):
    """The spans of one library."""

    spans: Annotated[tuple[OtlpSpan, ...], Meta(max_length=MAX_SPANS)] = ()
    scope: InstrumentationScope = InstrumentationScope()


class Resource(_OtlpStruct, frozen=True):
    """The process that recorded the spans."""

    attributes: _Attributes = ()


class ResourceSpans(_OtlpStruct, frozen=True):
    """The spans of one process."""

    scope_spans: Annotated[tuple[ScopeSpans, ...], Meta(max_length=64)] = ()
    resource: Resource = Resource()


class ExportRequest(_OtlpStruct, frozen=True):
    """The body of ``POST /v1/traces``."""

    resource_spans: Annotated[tuple[ResourceSpans, ...], Meta(max_length=64)] = ()


class ExportResponse(_OtlpStruct, frozen=True):
    """The response when every span was accepted."""


def encode_spans(spans: Iterable[Span], version: str) -> bytes:
    """Encode ``spans`` as a request, grouped by service. ``version`` is the program's version."""
    by_service: dict[str, list[OtlpSpan]] = {}
    for span in spans:
        by_service.setdefault(span.service, []).append(_to_otlp(span))
    scope = InstrumentationScope("octollm", version)
    return msgspec.json.encode(
        ExportRequest(
            tuple(
                ResourceSpans(
                    (ScopeSpans(tuple(service_spans), scope),),
                    Resource((KeyValue("service.name", AnyValue(string_value=service)),)),
                )
                for service, service_spans in by_service.items()
            )
        )
    )


def decode_spans(request: ExportRequest, service: str) -> list[Span]:
    """Return the spans of a request, attributed to the authenticated ``service`` whatever its resource says."""
    return [
        _from_otlp(span, service)
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _to_otlp(span: Span) -> OtlpSpan:
    attributes = tuple([KeyValue(name[:MAX_NAME], _to_any_value(value)) for name, value in span.attributes.items()])
    status = OtlpStatus()
    if span.code:
        attributes += (KeyValue(_ERROR_TYPE, AnyValue(string_value=span.code)),)
        status = OtlpStatus(mask_text(span.message)[:MAX_TEXT], _ERROR)
    return OtlpSpan(
        span.trace.trace_id,
        span.trace.span_id,
        span.name[:MAX_NAME],
        str(span.start_ns),
        str(span.end_ns),
        span.parent_id,
        _KIND_NUMBERS[span.kind],
        attributes,
        status,
        _SAMPLED,
    )


def _to_any_value(value: SpanValue) -> AnyValue:
    if isinstance(value, str):
        return AnyValue(value[:MAX_TEXT])
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=str(value))
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(array_value=ArrayValue(tuple([AnyValue(item[:MAX_TEXT]) for item in value])))


def _from_otlp(wire: OtlpSpan, service: str) -> Span:
    attributes = {each.key: value for each in wire.attributes if (value := _from_any_value(each.value)) is not None}
    code = ""
    if wire.status.code == _ERROR:
        code = str(attributes.pop(_ERROR_TYPE, "error"))[:MAX_NAME]
    start = int(wire.start_time_unix_nano)
    return Span(
        service,
        wire.name,
        _KINDS[wire.kind],
        TraceContext(wire.trace_id.lower(), wire.span_id.lower()),
        wire.parent_span_id.lower(),
        start,
        max(start, int(wire.end_time_unix_nano)),
        attributes,
        code,
        wire.status.message if code else "",
    )


def _from_any_value(value: AnyValue) -> SpanValue | None:
    """Return the value, or ``None`` for types that spans do not have here (bytes, maps, empty values)."""
    if value.string_value is not None:
        return value.string_value
    if value.bool_value is not None:
        return value.bool_value
    if value.int_value is not None:
        return max(-(2**63), min(int(value.int_value), 2**63 - 1))
    if value.double_value is not None:
        return value.double_value
    if value.array_value is not None:
        return tuple([str(item) for each in value.array_value.values if (item := _from_any_value(each)) is not None])
    return None
