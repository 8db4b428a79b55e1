"""How the services of an installation talk, by its settings."""

from __future__ import annotations

import msgspec

from octollm.config import Settings
from octollm.errors import SettingError
from octollm.rpc.tls import Tls
from octollm.rpc.wire import Wire

DOOR = "reflex"


def wire_of(settings: Settings) -> Wire:
    """Return how services are served and called. Raises ``setting_invalid`` for half of what TLS needs."""
    if settings.tls_cert is None or settings.tls_key is None:
        if settings.tls_cert is not None or settings.tls_key is not None or settings.tls_mutual:
            raise SettingError("TLS needs a certificate and its key: set both OCTOLLM_TLS_CERT and OCTOLLM_TLS_KEY.")
        return Wire(settings.http)
    return Wire(settings.http, Tls(settings.tls_cert, settings.tls_key, settings.tls_ca, settings.tls_mutual))


def served(wire: Wire, service: str) -> Wire:
    """Return how one service is served: who comes to the public door has a key to show, not a certificate."""
    if service != DOOR or wire.tls is None:
        return wire
    return Wire(wire.http, msgspec.structs.replace(wire.tls, mutual=False))
