"""All settings: environment variables ``OCTOLLM_*``, read here and nowhere else.

A wrong one is refused with its name, its value (secrets masked) and what would be right.
``docs/settings.md`` has a heading for each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlsplit

from octollm.errors import SettingError

PREFIX = "OCTOLLM_"

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_HEADER_VALUE = re.compile(r"[ -~]{1,4096}")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one process, already checked."""

    home: Path
    model: str
    model_url: str | None
    model_api_key: str | None
    model_cache: Path
    model_context: int
    redis_url: str
    database_url: str | None
    keys: Path | None
    enrolment_token: str | None
    trust_loopback: bool
    host: str
    port: int
    port_offset: int
    advertise_url: str | None
    http: Literal["1.1", "2"]
    tls_cert: Path | None
    tls_key: Path | None
    tls_ca: Path | None
    mtls: bool
    startup_timeout: float
    shutdown_grace: float
    allowed_hosts: tuple[str, ...]
    cors_origins: tuple[str, ...]
    oidc: Path | None
    rate_limit: str
    input_guardrail: Literal["block", "log", "off"]
    max_tokens: int
    max_time_seconds: float
    sandbox: Literal["auto", "bubblewrap", "wasi"]
    log_level: str
    trace_sample_ratio: float
    otlp_endpoint: str | None
    otlp_headers: tuple[tuple[str, str], ...]
    urls: tuple[str, ...]
    api_key: str | None
    service_urls: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client of an installation reads: the public door's addresses, the key to it, and how ports are shifted."""

    urls: tuple[str, ...]
    api_key: str | None
    port_offset: int
    tls_cert: Path | None
    tls_key: Path | None
    tls_ca: Path | None


@dataclass(frozen=True, slots=True)
class SettingSpec:
    """One setting: its name without the prefix, its default, and its parser.

    ``parse`` raises ``ValueError`` with a description of the valid values.
    """

    name: str
    default: str
    meaning: str
    parse: Callable[[str], object]
    secret: bool = False

    @property
    def variable(self) -> str:
        """The environment variable. OpenTelemetry's own variables carry no prefix of ours."""
        return self.name if self.name.startswith("OTEL_") else PREFIX + self.name


def _text(value: str) -> str:
    return value


def _optional(value: str) -> str | None:
    return value or None


def _path(value: str) -> Path:
    return Path(value).expanduser().absolute()


def _optional_path(value: str) -> Path | None:
    return _path(value) if value else None


def _url(*schemes: str) -> Callable[[str], str | None]:
    def parse(value: str) -> str | None:
        if not value:
            return None
        parts = urlsplit(value)
        if parts.scheme not in schemes or not (parts.netloc or parts.scheme == "memory"):
            raise ValueError(f"a URL that begins with {' or '.join(s + '://' for s in schemes)}")
        return value.rstrip("/")

    return parse


def _urls(*schemes: str) -> Callable[[str], tuple[str, ...]]:
    one = _url(*schemes)

    def parse(value: str) -> tuple[str, ...]:
        return tuple(url for part in value.split(",") if (url := one(part.strip())))

    return parse


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


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value

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
    found: list[tuple[str, str]] = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, equals, text = part.partition("=")
        if not equals or not _HEADER_NAME.fullmatch(name.strip()) or not _HEADER_VALUE.fullmatch(text.strip()):
            raise ValueError("NAME=VALUE, several separated by commas")
        found.append((name.strip(), text.strip()))
    return tuple(found)


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip().lower() for part in value.split(",") if part.strip())


_ORIGIN = re.compile(r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def _origins(value: str) -> tuple[str, ...]:
    origins = _names(value)
    for origin in origins:
        if _ORIGIN.fullmatch(origin) is None:
            raise ValueError("an origin is like https://app.example.org, without a path, and `*` is none")
    return origins


SETTING_SPECS: dict[str, SettingSpec] = {
    "home": SettingSpec("HOME", "~/.octollm", "Folder of data, keys and logs of one installation.", _path),
    "model": SettingSpec(
        "MODEL",
        "embedded",
        "`embedded` (the largest catalogue model in the cache), `embedded:NAME`, or `openai:NAME`.",
        _model,
    ),
    "model_url": SettingSpec(
        "MODEL_URL",
        "",
        "Base URL of an OpenAI-compatible server, for `openai:NAME`; empty is the provider's own.",
        _url("http", "https"),
    ),
    "model_api_key": SettingSpec("MODEL_API_KEY", "", "Key for that server.", _optional, secret=True),
    "model_cache": SettingSpec(
        "MODEL_CACHE", "~/.cache/octollm/models", "Folder of embedded models, shared by installations.", _path
    ),
    "model_context": SettingSpec(
        "MODEL_CONTEXT", "8192", "Context of the embedded model in tokens.", _integer(1024, 32768)
    ),
    "redis_url": SettingSpec(
        "REDIS_URL",
        "memory://octollm",
        "Redis for events, live text and the queue; `memory://` is one inside the process.",
        _url("redis", "rediss", "memory"),
        secret=True,
    ),
    "database_url": SettingSpec(
        "DATABASE_URL",
        "",
        "PostgreSQL database of the services that have one; empty is SQLite in the home.",
        _url("postgresql", "postgres"),
        secret=True,
    ),
    "keys": SettingSpec("KEYS", "", "Folder of the keys of one service; empty is the home's.", _optional_path),
    "enrolment_token": SettingSpec(
        "ENROLMENT_TOKEN", "", "Lets an arm of one's own join an installation the first time.", _optional, secret=True
    ),
    "trust_loopback": SettingSpec(
        "TRUST_LOOPBACK",
        "on",
        "`on`: a client on this machine's loopback counts as the local user. `off` where others log in.",
        _switch,
    ),
    "host": SettingSpec("HOST", "127.0.0.1", "Address that the services listen on.", _text),
    "port": SettingSpec("PORT", "0", "Port of `octollm serve`; 0 is the service's own.", _integer(0, 65535)),
    "port_offset": SettingSpec("PORT_OFFSET", "0", "Added to every service's port.", _integer(0, 50000)),
    "advertise_url": SettingSpec(
        "ADVERTISE_URL",
        "",
        "Where others reach what `octollm serve` serves; empty is its host name and port.",
        _url("http", "https"),
    ),
    "http": SettingSpec(
        "HTTP", "1.1", "HTTP that services call each other with; with `2` they serve both.", _choice("1.1", "2")
    ),
    "tls_cert": SettingSpec(
        "TLS_CERT", "", "Certificate of this process with its chain (PEM): serve in TLS.", _optional_path
    ),
    "tls_key": SettingSpec("TLS_KEY", "", "Its key (PEM, without a password).", _optional_path),
    "tls_ca": SettingSpec(
        "TLS_CA", "", "Authorities whose certificates are believed (PEM); empty is the system's.", _optional_path
    ),
    "mtls": SettingSpec("MTLS", "off", "`on`: whoever calls a service has to show a certificate, too.", _switch),
    "startup_timeout": SettingSpec(
        "STARTUP_TIMEOUT", "60", "How long `octollm serve` waits for what it needs.", _seconds(1, 3600)
    ),
    "shutdown_grace": SettingSpec(
        "SHUTDOWN_GRACE",
        "25",
        "How long calls in flight may take to end when `octollm serve` is told to stop.",
        _seconds(0, 600),
    ),
    "allowed_hosts": SettingSpec(
        "ALLOWED_HOSTS",
        "",
        "Further host names by which the public door is reached, comma-separated.",
        _names,
    ),
    "cors_origins": SettingSpec(
        "CORS_ORIGINS",
        "",
        "Origins whose pages may call the public door with an API key, comma-separated; none by default.",
        _origins,
    ),
    "oidc": SettingSpec(
        "OIDC", "", "File (TOML) of the OpenID Connect issuers whose logins are believed.", _optional_path
    ),
    "rate_limit": SettingSpec("RATE_LIMIT", "600/minute", "Requests per key at the public door.", _rate),
    "input_guardrail": SettingSpec(
        "INPUT_GUARDRAIL",
        "block",
        "What becomes of a goal of high risk at the public door: `block`, `log` or `off`.",
        _choice("block", "log", "off"),
    ),
    "max_tokens": SettingSpec(
        "MAX_TOKENS", "20000", "A task's tokens when it names no budget.", _integer(1, 100_000_000)
    ),
    "max_time_seconds": SettingSpec(
        "MAX_TIME_SECONDS", "900", "A task's wall time when it names none.", _seconds(1, 3600)
    ),
    "sandbox": SettingSpec(
        "SANDBOX",
        "auto",
        "What runs code: `auto`, `bubblewrap` or `wasi`.",
        _choice("auto", "bubblewrap", "wasi"),
    ),
    "log_level": SettingSpec(
        "LOG_LEVEL", "info", "Least level that is logged.", _choice("debug", "info", "warning", "error")
    ),
    "trace_sample_ratio": SettingSpec(
        "TRACE_SAMPLE_RATIO",
        "0.01",
        "Share of the calls outside tasks that leave a trace; 0 is none, 1 is all.",
        _ratio,
    ),
    "otlp_endpoint": SettingSpec(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        "Collector that the monitor hands every span on to (OTLP over HTTP, in JSON).",
        _url("http", "https"),
    ),
    "otlp_headers": SettingSpec(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "",
        "Headers that this collector wants: `NAME=VALUE`, comma-separated.",
        _headers,
        secret=True,
    ),
    "urls": SettingSpec(
        "URL",
        "",
        "Public door that the command line and clients talk to, several with commas; empty is this machine's.",
        _urls("http", "https"),
    ),
    "api_key": SettingSpec("API_KEY", "", "API key that they show at the door.", _optional, secret=True),
}
"""Every setting by its field. A service's address is ``OCTOLLM_<SERVICE>_URL`` besides."""

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
"""Old names of settings, each with its new one."""


def read_settings(environment: Mapping[str, str], services: tuple[str, ...]) -> Settings:
    """Read the settings from ``environment``; ``services`` are the names that may have a ``_URL``.

    Raises :class:`SettingError` naming the first invalid or renamed one.
    """
    _refuse_renamed(environment)
    values: dict[str, object] = {}
    for field in fields(Settings):
        if field.name in SETTING_SPECS:
            values[field.name] = _value(SETTING_SPECS[field.name], environment)
    values["service_urls"] = {service: urls for service in services if (urls := _service_urls(service, environment))}
    return Settings(**values)  # pyright: ignore[reportArgumentType]


def read_client_settings(environment: Mapping[str, str]) -> ClientSettings:
    """Read what a client needs from ``environment``, and nothing else. Raises :class:`SettingError`."""
    _refuse_renamed(environment)
    values = {field.name: _value(SETTING_SPECS[field.name], environment) for field in fields(ClientSettings)}
    return ClientSettings(**values)  # pyright: ignore[reportArgumentType]


def _refuse_renamed(environment: Mapping[str, str]) -> None:
    # A renamed setting is refused, not ignored: its old value may be what keeps an installation closed.
    for old, new in RENAMED.items():
        if old in environment:
            raise SettingError(f"{old} is not a setting any more. Did you mean {new}?")


def _value(spec: SettingSpec, environment: Mapping[str, str]) -> object:
    return _read(spec, environment.get(spec.variable, "") or spec.default)


def _read(spec: SettingSpec, value: str) -> object:
    try:
        return spec.parse(value)
    except ValueError as error:
        shown = "***" if spec.secret else repr(value)
        raise SettingError(f"{spec.variable} is {shown}; it must be {error}.") from None


def _service_urls(service: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    spec = SettingSpec(f"{service.upper()}_URL", "", "", _urls("http", "https"))
    return cast("tuple[str, ...]", _value(spec, environment))


def unknown_settings(environment: Mapping[str, str], services: tuple[str, ...]) -> list[str]:
    """Return a sentence for each ``OCTOLLM_*`` variable that nothing reads, with the nearest that exists."""
    known = {spec.variable for spec in SETTING_SPECS.values()}
    known |= {f"{PREFIX}{service.upper()}_URL" for service in services}
    sentences: list[str] = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            sentences.append(f"{name} is not a setting and is ignored.{hint}")
    return sentences
