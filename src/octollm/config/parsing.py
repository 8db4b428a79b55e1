"""What a setting is, and the parsers of its values.

A parser takes the text of an environment variable and raises ``ValueError`` with a description of the valid values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_HEADER_VALUE = re.compile(r"[ -~]{1,4096}")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_STREAM = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NATS_SUBJECT = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){0,7}")
_NATS_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_HOST = re.compile(r"(?:\*\.)?[a-z0-9][a-z0-9._-]{0,252}|\[[0-9a-f:.]+\]")

T = TypeVar("T")
ChoiceT = TypeVar("ChoiceT", bound=str)


@dataclass(frozen=True, slots=True)
class SettingSpec:
    """The declaration of one setting: environment variable, default as text, meaning, and parser.

    ``parse`` raises ``ValueError`` with a description of the valid values.
    """

    variable: str
    default: str
    meaning: str
    parse: Callable[[str], object]
    secret: bool = False


@dataclass(frozen=True, slots=True)
class EventSinkUrl:
    """A stream of NATS JetStream that gets a copy of every event, as ``OCTOLLM_EVENT_SINK`` says.

    ``hosts`` are ``host`` or ``host:port``; with ``tls`` a server without TLS is refused. A ``password`` of ``None``
    makes ``user`` a token.
    """

    hosts: tuple[str, ...]
    tls: bool = False
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    stream: str = "octollm"
    subject: str = "octollm.events"
    format: Literal["octollm", "cloudevents", "cloudevents-binary"] = "octollm"
    start: Literal["earliest", "latest"] = "earliest"
    replicas: int = 1


def setting(variable: str, default: str, meaning: str, parse: Callable[[str], T], *, secret: bool = False) -> T:
    """Declare a field of a settings class."""
    spec = SettingSpec(variable, default, meaning, parse, secret)
    return field(default_factory=lambda: parse(default), metadata={"spec": spec})


def parse_text(value: str) -> str:
    """Return the text as it is."""
    return value


def parse_optional(value: str) -> str | None:
    """Return the text; ``None`` for an empty one."""
    return value or None


def parse_path(value: str) -> Path:
    """Return an absolute path; ``~`` is the user's home."""
    return Path(value).expanduser().absolute()


def parse_optional_path(value: str) -> Path | None:
    """Return an absolute path; ``None`` for an empty text."""
    return parse_path(value) if value else None


def parse_url(*schemes: str) -> Callable[[str], str]:
    """Return the parser of a URL with one of ``schemes``."""

    def parse(value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in schemes or not (parts.netloc or parts.scheme == "memory"):
            raise ValueError(f"a URL that begins with {' or '.join(s + '://' for s in schemes)}")
        return value.rstrip("/")

    return parse


def parse_optional_url(*schemes: str) -> Callable[[str], str | None]:
    """Return the parser of a URL with one of ``schemes``, which may be empty."""
    required = parse_url(*schemes)
    return lambda value: required(value) if value else None


def parse_archive_url(value: str) -> str | None:
    """Return the URL of a folder or of a bucket; ``None`` for an empty text."""
    parts = urlsplit(value)
    # A folder has no host, and a bucket is one.
    is_folder = parts.scheme == "file" and not parts.netloc and parts.path.startswith("/")
    if value and not is_folder and not (parts.scheme == "s3" and parts.netloc):
        raise ValueError("file:///folder or s3://bucket/prefix")
    return value or None


def parse_urls(*schemes: str) -> Callable[[str], tuple[str, ...]]:
    """Return the parser of a list of URLs with one of ``schemes``."""
    one = parse_url(*schemes)
    return lambda value: tuple(one(part.strip()) for part in value.split(",") if part.strip())


def parse_integer(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of a whole number from ``low`` to ``high``."""

    def parse(value: str) -> int:
        if not value.lstrip("-").isdigit() or not low <= int(value) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return parse


def parse_seconds(low: float, high: float) -> Callable[[str], float]:
    """Return the parser of a number of seconds from ``low`` to ``high``."""

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ValueError(f"a number of seconds from {low:g} to {high:g}")
        return number

    return parse


def parse_optional_amount(value: str) -> float | None:
    """Return a number, 0 or more; ``None`` for an empty text."""
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = -1
    if not 0 <= number < 1e9:
        raise ValueError("a number, 0 or more")
    return number


def parse_ratio(value: str) -> float:
    """Return a number from 0 to 1."""
    try:
        number = float(value)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise ValueError("a number from 0 to 1")
    return number


def parse_choice(*choices: ChoiceT) -> Callable[[str], ChoiceT]:
    """Return the parser of one of ``choices``."""

    def parse(value: str) -> ChoiceT:
        for choice in choices:
            if choice == value:
                return choice
        raise ValueError(f"one of {', '.join(choices)}")

    return parse


def parse_switch(value: str) -> bool:
    """Return whether the value is ``on``; the other one is ``off``."""
    if value not in ("on", "off"):
        raise ValueError("on or off")
    return value == "on"


def parse_model(value: str) -> str:
    """Return the name of a chat model with its provider."""
    if value == "embedded" or (value.startswith(("embedded:", "openai:")) and value.partition(":")[2]):
        return value
    raise ValueError("embedded, embedded:NAME or openai:NAME")


def parse_embedding_model(value: str) -> str:
    """Return the name of an embedding model with its provider."""
    if value in ("embedded", "off") or (value.startswith("openai:") and value.partition(":")[2]):
        return value
    raise ValueError("embedded, openai:NAME or off")


def parse_rate(value: str) -> str:
    """Return a rate such as ``120/minute``."""
    count, slash, unit = value.partition("/")
    if not (slash and count.isdigit() and int(count) > 0 and unit in ("second", "minute", "hour")):
        raise ValueError("COUNT/second, COUNT/minute or COUNT/hour, e.g. 120/minute")
    return value


def parse_headers(value: str) -> tuple[tuple[str, str], ...]:
    """Return the headers of an exporter, as names and values."""
    # OpenTelemetry's own format: the list of W3C Baggage, in which values are percent-encoded.
    headers: list[tuple[str, str]] = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, equals, text = part.partition("=")
        name, text = name.strip(), unquote(text.strip())
        if not equals or not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(text):
            raise ValueError("NAME=VALUE, several separated by commas")
        headers.append((name, text))
    return tuple(headers)


def parse_names(value: str) -> tuple[str, ...]:
    """Return names separated by commas, in lower case."""
    return tuple(part.strip().lower() for part in value.split(",") if part.strip())


def parse_weights(value: str) -> tuple[tuple[str, float], ...]:
    """Return weights by name, as in ``acme=3,globex=1``."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, equals, number = part.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not equals or not name.strip() or not 0.01 <= weight <= 1000:
            raise ValueError("NAME=WEIGHT with weights from 0.01 to 1000, several separated by commas")
        weights[name.strip()] = weight
    return tuple(weights.items())


def parse_origins(value: str) -> tuple[str, ...]:
    """Return origins (RFC 6454) separated by commas."""
    origins = parse_names(value)
    for origin in origins:
        if _ORIGIN.fullmatch(origin) is None:
            raise ValueError("an origin is like https://app.example.org, without a path, and `*` is none")
    return origins


def parse_ports(value: str) -> tuple[int, ...]:
    """Return port numbers separated by commas."""
    ports = parse_names(value)
    if not ports or not all(port.isascii() and port.isdigit() and 0 < int(port) < 65536 for port in ports):
        raise ValueError("ports from 1 to 65535, separated by commas")
    return tuple(int(port) for port in ports)


def parse_allowed_hosts(value: str) -> tuple[tuple[str, str], ...]:
    """Return pairs of a tenant and a host that it may call."""
    entries = tuple(tuple(part.split("/")) for part in parse_names(value))
    if not all(len(entry) == 2 and _TENANT.fullmatch(entry[0]) and _HOST.fullmatch(entry[1]) for entry in entries):
        raise ValueError("TENANT/HOST, such as local/api.example.org or acme/*.example.org, separated by commas")
    return tuple((tenant, host) for tenant, host in entries)


def parse_event_sink(value: str) -> EventSinkUrl | None:
    """Return the stream of events that a URL names; ``None`` for an empty text."""
    if not value:
        return None
    meaning = "nats://[USER:PASSWORD@]HOST[:PORT][,HOST…][?stream=NAME], or tls:// to require TLS"
    try:
        parts = urlsplit(value)
    except ValueError:
        raise ValueError(meaning) from None
    if parts.scheme == "kafka":
        raise ValueError(f"{meaning}; Kafka is not supported")
    credentials, _at, hosts = parts.netloc.rpartition("@")
    user, colon, password = credentials.partition(":")
    names = tuple(hosts.split(","))
    if parts.scheme not in ("nats", "tls") or parts.path not in ("", "/") or not all(map(_NATS_HOST.fullmatch, names)):
        raise ValueError(meaning)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    parsers: dict[str, Callable[[str], object]] = {
        "stream": _parse_match(_STREAM, "stream=NAME has 1 to 64 characters of A-Z, a-z, 0-9, _ and -"),
        "subject": _parse_match(_NATS_SUBJECT, "subject=PREFIX is up to 8 tokens of A-Z, a-z, 0-9, _ and -"),
        "format": _option("format", parse_choice("octollm", "cloudevents", "cloudevents-binary")),
        "start": _option("start", parse_choice("earliest", "latest")),
        "replicas": _option("replicas", parse_integer(1, 5)),
    }
    if unknown := options.keys() - parsers.keys():
        raise ValueError(f"a URL whose options are {', '.join(parsers)}, not {min(unknown)[:40]!r}")
    return EventSinkUrl(
        hosts=names,
        tls=parts.scheme == "tls",
        user=unquote(user) or None,
        password=unquote(password) if colon else None,
        **{name: parsers[name](text) for name, text in options.items()},  # pyright: ignore[reportArgumentType]
    )


def _parse_match(pattern: re.Pattern[str], meaning: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if pattern.fullmatch(value) is None:
            raise ValueError(f"a URL in which {meaning}")
        return value

    return parse


def _option(name: str, parse: Callable[[str], T]) -> Callable[[str], T]:
    def parse_option(value: str) -> T:
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"a URL in which {name} is {error}") from None

    return parse_option
