"""How the services of an installation talk, by its settings."""

from __future__ import annotations

import msgspec

from octollm.config import Settings
from octollm.errors import SettingError
from octollm.rpc.tls import TlsConfig
from octollm.rpc.wire import TransportConfig

GATEWAY = "reflex"


def transport_from_settings(settings: Settings) -> TransportConfig:
    """Return how services are served and called. Raises ``setting_invalid`` for half of what TLS needs."""
    if settings.tls_cert is None or settings.tls_key is None:
        if settings.tls_cert is not None or settings.tls_key is not None or settings.mtls:
            raise SettingError("TLS needs a certificate and its key: set both OCTOLLM_TLS_CERT and OCTOLLM_TLS_KEY.")
        return TransportConfig(settings.http)
    return TransportConfig(
        settings.http, TlsConfig(settings.tls_cert, settings.tls_key, settings.tls_ca, settings.mtls)
    )


def server_transport(transport: TransportConfig, service: str) -> TransportConfig:
    """Return how one service is served: who comes to the public door has a key to show, not a certificate."""
    if service != GATEWAY or transport.tls is None:
        return transport
    return TransportConfig(transport.http_version, msgspec.structs.replace(transport.tls, mutual=False))
