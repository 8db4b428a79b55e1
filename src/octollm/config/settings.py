"""The settings, each declared once, and how they are read from the environment."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar, cast

from octollm.config.parsing import (
    EventSinkUrl,
    SettingSpec,
    parse_allowed_hosts,
    parse_archive_url,
    parse_choice,
    parse_embedding_model,
    parse_event_sink,
    parse_headers,
    parse_integer,
    parse_model,
    parse_names,
    parse_optional,
    parse_optional_amount,
    parse_optional_path,
    parse_optional_url,
    parse_origins,
    parse_path,
    parse_ports,
    parse_rate,
    parse_ratio,
    parse_seconds,
    parse_switch,
    parse_text,
    parse_url,
    parse_urls,
    parse_weights,
    setting,
)
from octollm.errors import SettingError

PREFIX = "OCTOLLM_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """The settings that a client of an installation reads."""

    urls: tuple[str, ...] = setting(
        "OCTOLLM_URL",
        "",
        "Address of the gateway for clients, comma-separated for several; empty is this machine's.",
        parse_urls("http", "https"),
    )
    api_key: str | None = setting(
        "OCTOLLM_API_KEY", "", "API key of clients and the command line.", parse_optional, secret=True
    )
    port_offset: int = setting("OCTOLLM_PORT_OFFSET", "0", "Added to every service's port.", parse_integer(0, 50000))
    tls_cert: Path | None = setting(
        "OCTOLLM_TLS_CERT", "", "Certificate of this process with its chain (PEM); turns TLS on.", parse_optional_path
    )
    tls_key: Path | None = setting(
        "OCTOLLM_TLS_KEY", "", "Private key of that certificate (PEM, without a password).", parse_optional_path
    )
    tls_ca: Path | None = setting(
        "OCTOLLM_TLS_CA", "", "Certificate authorities to trust (PEM); empty is the system's.", parse_optional_path
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ClientSettings):
    """The settings of one process, already checked. ``service_urls`` holds what ``OCTOLLM_<SERVICE>_URL`` say."""

    home: Path = setting("OCTOLLM_HOME", "~/.octollm", "Folder of data, keys and logs of one installation.", parse_path)
    model: str = setting(
        "OCTOLLM_MODEL",
        "embedded",
        "`embedded` (the largest catalogue model in the cache), `embedded:NAME`, or `openai:NAME`.",
        parse_model,
    )
    model_url: str | None = setting(
        "OCTOLLM_MODEL_URL",
        "",
        "Base URL of an OpenAI-compatible server, for `openai:NAME`; empty is the provider's own.",
        parse_optional_url("http", "https"),
    )
    model_api_key: str | None = setting(
        "OCTOLLM_MODEL_API_KEY", "", "Key for that server.", parse_optional, secret=True
    )
    model_cache: Path = setting(
        "OCTOLLM_MODEL_CACHE",
        "~/.cache/octollm/models",
        "Folder of embedded models, shared by installations.",
        parse_path,
    )
    model_context: int = setting(
        "OCTOLLM_MODEL_CONTEXT", "8192", "Context of the embedded model in tokens.", parse_integer(1024, 32768)
    )
    embedding_model: str = setting(
        "OCTOLLM_EMBEDDING_MODEL",
        "embedded",
        "Model for embeddings: `embedded`, `openai:NAME`, or `off`.",
        parse_embedding_model,
    )
    embedding_url: str | None = setting(
        "OCTOLLM_EMBEDDING_URL",
        "",
        "Base URL of an OpenAI-compatible server, for embeddings by `openai:NAME`; empty is the provider's own.",
        parse_optional_url("http", "https"),
    )
    embedding_api_key: str | None = setting(
        "OCTOLLM_EMBEDDING_API_KEY", "", "Key for that server.", parse_optional, secret=True
    )
    redis_url: str = setting(
        "OCTOLLM_REDIS_URL",
        "memory://octollm",
        "Redis for events, live text, caches and notifications; `memory://` is one inside the process.",
        parse_url("redis", "rediss", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel", "memory"),
        secret=True,
    )
    database_url: str | None = setting(
        "OCTOLLM_DATABASE_URL",
        "",
        "PostgreSQL database of the services; empty is SQLite files in the home folder.",
        parse_optional_url("postgresql", "postgres"),
        secret=True,
    )
    keys: Path | None = setting(
        "OCTOLLM_KEYS", "", "Folder of the keys of one service; empty is the home folder's.", parse_optional_path
    )
    enrolment_token: str | None = setting(
        "OCTOLLM_ENROLMENT_TOKEN",
        "",
        "Token with which an arm of your own enrols in an installation the first time.",
        parse_optional,
        secret=True,
    )
    trust_loopback: bool = setting(
        "OCTOLLM_TRUST_LOOPBACK",
        "on",
        "`on`: a client on the loopback address is the local user. `off` on a machine where others log in.",
        parse_switch,
    )
    host: str = setting("OCTOLLM_HOST", "127.0.0.1", "Address that the services listen on.", parse_text)
    port: int = setting(
        "OCTOLLM_PORT", "0", "Port of `octollm serve`; 0 is the service's own.", parse_integer(0, 65535)
    )
    advertise_url: str | None = setting(
        "OCTOLLM_ADVERTISE_URL",
        "",
        "URL at which other services reach this process; empty is its host name and port.",
        parse_optional_url("http", "https"),
    )
    mtls: bool = setting(
        "OCTOLLM_MTLS", "off", "`on`: mutual TLS, each caller of a service presents a certificate.", parse_switch
    )
    startup_timeout: float = setting(
        "OCTOLLM_STARTUP_TIMEOUT",
        "60",
        "Seconds that `octollm serve` waits for the services it depends on.",
        parse_seconds(1, 3600),
    )
    shutdown_grace: float = setting(
        "OCTOLLM_SHUTDOWN_GRACE",
        "25",
        "Seconds that calls in flight have to end after `octollm serve` receives a stop signal.",
        parse_seconds(0, 600),
    )
    allowed_hosts: tuple[str, ...] = setting(
        "OCTOLLM_ALLOWED_HOSTS", "", "Additional host names of the gateway, comma-separated.", parse_names
    )
    cors_origins: tuple[str, ...] = setting(
        "OCTOLLM_CORS_ORIGINS",
        "",
        "Origins of web pages that may call the gateway with an API key (CORS), comma-separated; none by default.",
        parse_origins,
    )
    oidc: Path | None = setting(
        "OCTOLLM_OIDC", "", "File (TOML) with the trusted OpenID Connect issuers.", parse_optional_path
    )
    egress_origins: tuple[str, ...] = setting(
        "OCTOLLM_EGRESS_ORIGINS",
        "",
        "Origins that requests to users' URLs may reach although they are private or use http, comma-separated.",
        parse_origins,
    )
    egress_ports: tuple[int, ...] = setting(
        "OCTOLLM_EGRESS_PORTS",
        "443,8443",
        "Ports that requests to users' URLs may reach, comma-separated.",
        parse_ports,
    )
    http_allowlist: tuple[tuple[str, str], ...] = setting(
        "OCTOLLM_HTTP_ALLOWLIST",
        "",
        "Hosts that the executor's `POST /http` may call: `TENANT/HOST`, comma-separated; none by default.",
        parse_allowed_hosts,
    )
    rate_limit: str = setting(
        "OCTOLLM_RATE_LIMIT", "600/minute", "Rate limit of the gateway for each API key.", parse_rate
    )
    max_watchers: int = setting(
        "OCTOLLM_MAX_WATCHERS",
        "16384",
        "Live connections (WebSocket, server-sent events) that one gateway process has open at a time.",
        parse_integer(1, 1_000_000),
    )
    max_watchers_per_key: int = setting(
        "OCTOLLM_MAX_WATCHERS_PER_KEY",
        "2048",
        "Those of one API key or session.",
        parse_integer(1, 1_000_000),
    )
    max_watchers_per_address: int = setting(
        "OCTOLLM_MAX_WATCHERS_PER_ADDRESS",
        "8192",
        "Those from one address, or from one /64 network of IPv6. All clients behind a proxy have its address.",
        parse_integer(1, 1_000_000),
    )
    input_guardrail: Literal["block", "log", "off"] = setting(
        "OCTOLLM_INPUT_GUARDRAIL",
        "block",
        "What the gateway does with a goal of high risk: `block`, `log` or `off`.",
        parse_choice("block", "log", "off"),
    )
    max_tokens: int = setting(
        "OCTOLLM_MAX_TOKENS", "20000", "Token budget of a task without one of its own.", parse_integer(1, 100_000_000)
    )
    max_time_seconds: float = setting(
        "OCTOLLM_MAX_TIME_SECONDS",
        "900",
        "Wall time of a task without a limit of its own, in seconds.",
        parse_seconds(1, 3600),
    )
    max_running_tasks: int = setting(
        "OCTOLLM_MAX_RUNNING_TASKS",
        "16",
        "Tasks that one orchestrator runs at a time; they mostly wait for arms.",
        parse_integer(1, 1000),
    )
    max_running_per_tenant: int = setting(
        "OCTOLLM_MAX_RUNNING_PER_TENANT",
        "0",
        "Tasks of one tenant that run at a time on all orchestrators together; 0 is any number.",
        parse_integer(0, 100_000),
    )
    max_running_per_key: int = setting(
        "OCTOLLM_MAX_RUNNING_PER_KEY",
        "0",
        "Tasks of one API key or login that run at a time on all orchestrators together; 0 is any number.",
        parse_integer(0, 100_000),
    )
    max_running_per_arm: int = setting(
        "OCTOLLM_MAX_RUNNING_PER_ARM",
        "0",
        "Steps of one arm that one orchestrator runs at a time; 0 is any number.",
        parse_integer(0, 100_000),
    )
    max_waiting_tasks: int = setting(
        "OCTOLLM_MAX_WAITING_TASKS",
        "10000",
        "Tasks that may wait for a worker; a further one is answered 503. 0 is any number.",
        parse_integer(0, 10_000_000),
    )
    max_waiting_per_tenant: int = setting(
        "OCTOLLM_MAX_WAITING_PER_TENANT",
        "2000",
        "Tasks of one tenant that may wait for a worker; a further one is answered 429. 0 is any number.",
        parse_integer(0, 10_000_000),
    )
    tenant_weights: tuple[tuple[str, float], ...] = setting(
        "OCTOLLM_TENANT_WEIGHTS",
        "",
        "Shares of tenants in the running tasks: `NAME=WEIGHT`, comma-separated; a tenant has 1 by default.",
        parse_weights,
    )
    approval_steps: tuple[str, ...] = setting(
        "OCTOLLM_APPROVAL_STEPS",
        "",
        "Steps that need the approval of a person: arms and scopes, comma-separated, e.g. `deployer,executor:http`;"
        " `*` is every step.",
        parse_names,
    )
    approval_cost_usd: float | None = setting(
        "OCTOLLM_APPROVAL_COST_USD",
        "",
        "US dollars above which a task waits for approval before its next step; empty is no limit.",
        parse_optional_amount,
    )
    approval_seconds: float = setting(
        "OCTOLLM_APPROVAL_SECONDS",
        "86400",
        "Seconds within which an approval must be decided; after that the task fails.",
        parse_seconds(1, 2_592_000),
    )
    sandbox: Literal["auto", "bubblewrap", "wasi"] = setting(
        "OCTOLLM_SANDBOX",
        "auto",
        "Sandbox for code: `auto`, `bubblewrap` or `wasi`.",
        parse_choice("auto", "bubblewrap", "wasi"),
    )
    event_retention_days: int = setting(
        "OCTOLLM_EVENT_RETENTION_DAYS",
        "90",
        "Days to keep an event; 0 is forever.",
        parse_integer(0, 36500),
    )
    event_retention_count: int = setting(
        "OCTOLLM_EVENT_RETENTION_COUNT",
        "5000000",
        "Maximum number of events in the log; 0 is no limit.",
        parse_integer(0, 10**12),
    )
    task_retention_days: int = setting(
        "OCTOLLM_TASK_RETENTION_DAYS", "90", "Days to keep a task after its end; 0 is forever.", parse_integer(0, 36500)
    )
    file_retention_days: int = setting(
        "OCTOLLM_FILE_RETENTION_DAYS",
        "90",
        "Days to keep a file that no task refers to; 0 is forever.",
        parse_integer(0, 36500),
    )
    audit_retention_days: int = setting(
        "OCTOLLM_AUDIT_RETENTION_DAYS",
        "0",
        "Days until a row of the audit log moves to the archive; 0 is never.",
        parse_integer(0, 36500),
    )
    archive_url: str | None = setting(
        "OCTOLLM_ARCHIVE_URL",
        "",
        "Archive in which retention stores rows before it deletes them; empty is none.",
        parse_archive_url,
    )
    event_sink: EventSinkUrl | None = setting(
        "OCTOLLM_EVENT_SINK",
        "",
        "NATS JetStream that gets a copy of every event: `nats://HOST:4222`; empty is none.",
        parse_event_sink,
        secret=True,
    )
    event_sink_credentials: Path | None = setting(
        "OCTOLLM_EVENT_SINK_CREDENTIALS",
        "",
        "File with the user's JWT and seed for that server (`.creds`).",
        parse_optional_path,
    )
    log_level: str = setting(
        "OCTOLLM_LOG_LEVEL", "info", "Lowest level that is logged.", parse_choice("debug", "info", "warning", "error")
    )
    trace_sample_ratio: float = setting(
        "OCTOLLM_TRACE_SAMPLE_RATIO",
        "0.01",
        "Sampling ratio of traces for calls outside tasks, from 0 (none) to 1 (all).",
        parse_ratio,
    )
    otlp_endpoint: str | None = setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        "Base URL of the collector to which the monitor exports spans (OTLP over HTTP, in JSON).",
        parse_optional_url("http", "https"),
    )
    otlp_headers: tuple[tuple[str, str], ...] = setting(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "",
        "Headers for that collector: `NAME=VALUE`, comma-separated, values percent-encoded.",
        parse_headers,
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
            raise SettingError(f"{old} is no longer a setting. Did you mean {new}?")
    for old, remedy in REMOVED.items():
        if old in environment:
            raise SettingError(f"{old} is no longer a setting. {remedy}")
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
    spec = SettingSpec(f"{PREFIX}{service.upper()}_URL", "", "", parse_urls("http", "https"))
    return cast("tuple[str, ...]", _value(spec, environment))


def unknown_settings(environment: Mapping[str, str], services: tuple[str, ...]) -> list[str]:
    """Return a warning for each ``OCTOLLM_*`` variable that nothing reads, with the nearest name that exists."""
    known_variables = {spec.variable for spec in SETTING_SPECS.values()}
    known_variables |= {f"{PREFIX}{service.upper()}_URL" for service in services}
    # Former settings are refused by whoever reads the settings; a warning that they are ignored would contradict it.
    refused = {*RENAMED, *REMOVED}
    warnings: list[str] = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known_variables | refused:
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
