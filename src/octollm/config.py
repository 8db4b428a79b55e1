"""Settings: environment variables, declared, read and checked in this module only.

Each setting is one field of :class:`Settings`, declared with its variable, default, meaning and parser. A wrong value
is refused with the variable's name, the value (masked for secrets) and the valid values. ``docs/settings.md`` has a
heading for each.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar, cast
from urllib.parse import unquote, urlsplit

from octollm.errors import SettingError

PREFIX = "OCTOLLM_"

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_HEADER_VALUE = re.compile(r"[ -~]{1,4096}")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")

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


def _setting(variable: str, default: str, meaning: str, parse: Callable[[str], T], *, secret: bool = False) -> T:
    """Declare a field of a settings class."""
    spec = SettingSpec(variable, default, meaning, parse, secret)
    return field(default_factory=lambda: parse(default), metadata={"spec": spec})


def _text(value: str) -> str:
    return value


def _optional(value: str) -> str | None:
    return value or None


def _path(value: str) -> Path:
    return Path(value).expanduser().absolute()


def _optional_path(value: str) -> Path | None:
    return _path(value) if value else None


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in schemes or not (parts.netloc or parts.scheme == "memory"):
            raise ValueError(f"a URL that begins with {' or '.join(s + '://' for s in schemes)}")
        return value.rstrip("/")

    return parse


def _optional_url(*schemes: str) -> Callable[[str], str | None]:
    required = _url(*schemes)
    return lambda value: required(value) if value else None


def _urls(*schemes: str) -> Callable[[str], tuple[str, ...]]:
    one = _url(*schemes)
    return lambda value: tuple(one(part.strip()) for part in value.split(",") if part.strip())


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not value.lstrip("-").isdigit() or not low <= int(value) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ValueError(f"a number of seconds from {low:g} to {high:g}")
        return number

    return parse


def _ratio(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise ValueError("a number from 0 to 1")
    return number


def _choice(*choices: ChoiceT) -> Callable[[str], ChoiceT]:
    def parse(value: str) -> ChoiceT:
        for choice in choices:
            if choice == value:
                return choice
        raise ValueError(f"one of {', '.join(choices)}")

    return parse


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError("on or off")
    return value == "on"


def _model(value: str) -> str:
    if value == "embedded" or (value.startswith(("embedded:", "openai:")) and value.partition(":")[2]):
        return value
    raise ValueError("embedded, embedded:NAME or openai:NAME")


def _rate(value: str) -> str:
    count, slash, unit = value.partition("/")
    if not (slash and count.isdigit() and int(count) > 0 and unit in ("second", "minute", "hour")):
        raise ValueError("COUNT/second, COUNT/minute or COUNT/hour, e.g. 120/minute")
    return value


def _headers(value: str) -> tuple[tuple[str, str], ...]:
    # OpenTelemetry's own format: the list of W3C Baggage, in which values are percent-encoded.
    headers: list[tuple[str, str]] = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, equals, text = part.partition("=")
        name, text = name.strip(), unquote(text.strip())
        if not equals or not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(text):
            raise ValueError("NAME=VALUE, several separated by commas")
        headers.append((name, text))
    return tuple(headers)


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip().lower() for part in value.split(",") if part.strip())


def _origins(value: str) -> tuple[str, ...]:
    origins = _names(value)
    for origin in origins:
        if _ORIGIN.fullmatch(origin) is None:
            raise ValueError("an origin is like https://app.example.org, without a path, and `*` is none")
    return origins


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """The settings that a client of an installation reads."""

    urls: tuple[str, ...] = _setting(
        "OCTOLLM_URL",
        "",
        "Address of the gateway for clients, comma-separated for several; empty is this machine's.",
        _urls("http", "https"),
    )
    api_key: str | None = _setting(
        "OCTOLLM_API_KEY", "", "API key of clients and the command line.", _optional, secret=True
    )
    port_offset: int = _setting("OCTOLLM_PORT_OFFSET", "0", "Added to every service's port.", _integer(0, 50000))
    tls_cert: Path | None = _setting(
        "OCTOLLM_TLS_CERT", "", "Certificate of this process with its chain (PEM); turns TLS on.", _optional_path
    )
    tls_key: Path | None = _setting(
        "OCTOLLM_TLS_KEY", "", "Private key of that certificate (PEM, without a password).", _optional_path
    )
    tls_ca: Path | None = _setting(
        "OCTOLLM_TLS_CA", "", "Certificate authorities to trust (PEM); empty is the system's.", _optional_path
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ClientSettings):
    """The settings of one process, already checked. ``service_urls`` holds what ``OCTOLLM_<SERVICE>_URL`` say."""

    home: Path = _setting("OCTOLLM_HOME", "~/.octollm", "Folder of data, keys and logs of one installation.", _path)
    model: str = _setting(
        "OCTOLLM_MODEL",
        "embedded",
        "`embedded` (the largest catalogue model in the cache), `embedded:NAME`, or `openai:NAME`.",
        _model,
    )
    model_url: str | None = _setting(
        "OCTOLLM_MODEL_URL",
        "",
        "Base URL of an OpenAI-compatible server, for `openai:NAME`; empty is the provider's own.",
        _optional_url("http", "https"),
    )
    model_api_key: str | None = _setting("OCTOLLM_MODEL_API_KEY", "", "Key for that server.", _optional, secret=True)
    model_cache: Path = _setting(
        "OCTOLLM_MODEL_CACHE", "~/.cache/octollm/models", "Folder of embedded models, shared by installations.", _path
    )
    model_context: int = _setting(
        "OCTOLLM_MODEL_CONTEXT", "8192", "Context of the embedded model in tokens.", _integer(1024, 32768)
    )
    redis_url: str = _setting(
        "OCTOLLM_REDIS_URL",
        "memory://octollm",
        "Redis for events, live text and the queue; `memory://` is one inside the process.",
        _url("redis", "rediss", "memory"),
        secret=True,
    )
    database_url: str | None = _setting(
        "OCTOLLM_DATABASE_URL",
        "",
        "PostgreSQL database of the services; empty is SQLite files in the home folder.",
        _optional_url("postgresql", "postgres"),
        secret=True,
    )
    keys: Path | None = _setting(
        "OCTOLLM_KEYS", "", "Folder of the keys of one service; empty is the home folder's.", _optional_path
    )
    enrolment_token: str | None = _setting(
        "OCTOLLM_ENROLMENT_TOKEN",
        "",
        "Token with which an arm of your own enrols in an installation the first time.",
        _optional,
        secret=True,
    )
    trust_loopback: bool = _setting(
        "OCTOLLM_TRUST_LOOPBACK",
        "on",
        "`on`: a client on the loopback address is the local user. `off` on a machine where others log in.",
        _switch,
    )
    host: str = _setting("OCTOLLM_HOST", "127.0.0.1", "Address that the services listen on.", _text)
    port: int = _setting("OCTOLLM_PORT", "0", "Port of `octollm serve`; 0 is the service's own.", _integer(0, 65535))
    advertise_url: str | None = _setting(
        "OCTOLLM_ADVERTISE_URL",
        "",
        "URL at which other services reach this process; empty is its host name and port.",
        _optional_url("http", "https"),
    )
    mtls: bool = _setting(
        "OCTOLLM_MTLS", "off", "`on`: mutual TLS, each caller of a service presents a certificate.", _switch
    )
    startup_timeout: float = _setting(
        "OCTOLLM_STARTUP_TIMEOUT",
        "60",
        "Seconds that `octollm serve` waits for the services it depends on.",
        _seconds(1, 3600),
    )
    shutdown_grace: float = _setting(
        "OCTOLLM_SHUTDOWN_GRACE",
        "25",
        "Seconds that calls in flight have to end after `octollm serve` receives a stop signal.",
        _seconds(0, 600),
    )
    allowed_hosts: tuple[str, ...] = _setting(
        "OCTOLLM_ALLOWED_HOSTS", "", "Additional host names of the gateway, comma-separated.", _names
    )
    cors_origins: tuple[str, ...] = _setting(
        "OCTOLLM_CORS_ORIGINS",
        "",
        "Origins of web pages that may call the gateway with an API key (CORS), comma-separated; none by default.",
        _origins,
    )
    oidc: Path | None = _setting(
        "OCTOLLM_OIDC", "", "File (TOML) with the trusted OpenID Connect issuers.", _optional_path
    )
    rate_limit: str = _setting("OCTOLLM_RATE_LIMIT", "600/minute", "Rate limit of the gateway for each API key.", _rate)
    input_guardrail: Literal["block", "log", "off"] = _setting(
        "OCTOLLM_INPUT_GUARDRAIL",
        "block",
        "What the gateway does with a goal of high risk: `block`, `log` or `off`.",
        _choice("block", "log", "off"),
    )
    max_tokens: int = _setting(
        "OCTOLLM_MAX_TOKENS", "20000", "Token budget of a task that names none.", _integer(1, 100_000_000)
    )
    max_time_seconds: float = _setting(
        "OCTOLLM_MAX_TIME_SECONDS", "900", "Wall time of a task that names none, in seconds.", _seconds(1, 3600)
    )
    sandbox: Literal["auto", "bubblewrap", "wasi"] = _setting(
        "OCTOLLM_SANDBOX",
        "auto",
        "Sandbox for code: `auto`, `bubblewrap` or `wasi`.",
        _choice("auto", "bubblewrap", "wasi"),
    )
    log_level: str = _setting(
        "OCTOLLM_LOG_LEVEL", "info", "Lowest level that is logged.", _choice("debug", "info", "warning", "error")
    )
    trace_sample_ratio: float = _setting(
        "OCTOLLM_TRACE_SAMPLE_RATIO",
        "0.01",
        "Sampling ratio of traces for calls outside tasks, from 0 (none) to 1 (all).",
        _ratio,
    )
    otlp_endpoint: str | None = _setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        "Base URL of the collector to which the monitor exports spans (OTLP over HTTP, in JSON).",
        _optional_url("http", "https"),
    )
    otlp_headers: tuple[tuple[str, str], ...] = _setting(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "",
        "Headers for that collector: `NAME=VALUE`, comma-separated, values percent-encoded.",
        _headers,
        secret=True,
    )
    service_urls: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


SETTING_SPECS: dict[str, SettingSpec] = {
    each.name: each.metadata["spec"] for each in fields(Settings) if "spec" in each.metadata
}
"""Every setting by its field. The address of a service, ``OCTOLLM_<SERVICE>_URL``, comes on top."""

RENAMED = {
    "OCTOLLM_DRAIN_SECONDS": "OCTOLLM_SHUTDOWN_GRACE",
    "OCTOLLM_JOIN_SECRET": "OCTOLLM_ENROLMENT_TOKEN",
    "OCTOLLM_LOCAL_TRUST": "OCTOLLM_TRUST_LOOPBACK",
    "OCTOLLM_OTLP_HEADERS": "OTEL_EXPORTER_OTLP_HEADERS",
    "OCTOLLM_OTLP_URL": "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OCTOLLM_PORT_SHIFT": "OCTOLLM_PORT_OFFSET",
    "OCTOLLM_SCREENING": "OCTOLLM_INPUT_GUARDRAIL",
    "OCTOLLM_START_SECONDS": "OCTOLLM_STARTUP_TIMEOUT",
    "OCTOLLM_TLS_MUTUAL": "OCTOLLM_MTLS",
    "OCTOLLM_TRACE_SHARE": "OCTOLLM_TRACE_SAMPLE_RATIO",
}
"""Former names of settings, each with the name that replaced it."""

REMOVED = {
    "OCTOLLM_HTTP": (
        "Remove it: services call each other over HTTP/1.1. For HTTP/2 towards clients, put a proxy in front of the"
        " gateway, as deploy/haproxy.cfg does."
    ),
}
"""Former settings without a successor, each with what to do instead."""


def read_settings(environment: Mapping[str, str], services: tuple[str, ...]) -> Settings:
    """Read all settings from ``environment``; ``services`` are the names that may have a ``_URL``.

    Raises :class:`SettingError` that names the first invalid, renamed or removed one.
    """
    service_urls = {service: urls for service in services if (urls := _service_urls(service, environment))}
    return _read(Settings, environment, service_urls=service_urls)


def read_client_settings(environment: Mapping[str, str]) -> ClientSettings:
    """Read only what a client needs: a wrong setting of a server does not stop it. Raises :class:`SettingError`."""
    return _read(ClientSettings, environment)


SettingsT = TypeVar("SettingsT", bound=ClientSettings)


def _read(kind: type[SettingsT], environment: Mapping[str, str], **others: object) -> SettingsT:
    # A former setting is refused, not ignored: its value may be what keeps an installation closed.
    for old, new in RENAMED.items():
        if old in environment:
            raise SettingError(f"{old} is not a setting any more. Did you mean {new}?")
    for old, remedy in REMOVED.items():
        if old in environment:
            raise SettingError(f"{old} is not a setting any more. {remedy}")
    values = {
        each.name: _value(SETTING_SPECS[each.name], environment) for each in fields(kind) if each.name in SETTING_SPECS
    }
    return kind(**values, **others)  # pyright: ignore[reportArgumentType] - each parser returns its field's type


def _value(spec: SettingSpec, environment: Mapping[str, str]) -> object:
    value = environment.get(spec.variable, "") or spec.default
    try:
        return spec.parse(value)
    except ValueError as error:
        displayed = "***" if spec.secret else repr(value)
        raise SettingError(f"{spec.variable} is {displayed}; it must be {error}.") from None


def _service_urls(service: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    spec = SettingSpec(f"{PREFIX}{service.upper()}_URL", "", "", _urls("http", "https"))
    return cast("tuple[str, ...]", _value(spec, environment))


def unknown_settings(environment: Mapping[str, str], services: tuple[str, ...]) -> list[str]:
    """Return a warning for each ``OCTOLLM_*`` variable that nothing reads, with the nearest name that exists."""
    known_variables = {spec.variable for spec in SETTING_SPECS.values()}
    known_variables |= {f"{PREFIX}{service.upper()}_URL" for service in services}
    warnings: list[str] = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known_variables:
            nearest = difflib.get_close_matches(name, known_variables, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            warnings.append(f"{name} is not a setting and is ignored.{hint}")
    return warnings


def read_secret_file(path: Path) -> bytes:
    """Return the content of a secret's file. Raises :class:`SettingError` when every user may read it, and ``OSError``.

    A group may read it: the secrets of a container are links, owned by root and readable by a group.
    """
    if os.name == "posix" and path.stat().st_mode & 0o007:
        raise SettingError(f"{path} holds a secret and every user may read it. Run `chmod o-rwx {path}`.")
    return path.read_bytes()
