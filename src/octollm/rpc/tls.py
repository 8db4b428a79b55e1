"""TLS between services (RFC 8446).

The certificate that a process presents, and the certificate authorities that it trusts.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from octollm.errors import SettingError, map_exceptions


class TlsConfig(msgspec.Struct, frozen=True):
    """PEM files: the certificate of this process with its key, and the authorities that it trusts.

    ``ca`` is ``None`` for the system's authorities. With ``mutual`` a client must present a certificate of one of
    them.
    """

    certificate: Path
    key: Path
    ca: Path | None = None
    mutual: bool = False

    def server_context(self) -> ssl.SSLContext:
        """Return the context of a server. Raises ``setting_invalid`` for a file that cannot be loaded."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load_certificate(context, self.certificate, self.key)
        context.set_alpn_protocols(["http/1.1"])
        if self.mutual:
            _load_authorities(context, self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return the context of a client, which presents its certificate to a server that requests one."""
        return client_context(self.ca, self.certificate, self.key)


def client_context(ca: Path | None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Return the context of a client; ``ca`` is ``None`` for the system's authorities.

    Raises ``setting_invalid`` for a file that cannot be loaded.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_authorities(context, ca)
    if certificate is not None and key is not None:
        _load_certificate(context, certificate, key)
    return context


def external_context(extra: Path | None = None) -> ssl.SSLContext:
    """Return the context for external servers: it trusts the system's authorities, and those of the file ``extra``.

    Raises ``setting_invalid`` for a file that cannot be loaded.
    """
    context = client_context(None)
    if extra is not None:
        _load_authorities(context, extra)
    return context


def external_context_factory(extra: Path | None) -> Callable[[], ssl.SSLContext]:
    """Return what creates the :func:`external_context` when it is needed; many processes call no external server.

    Raises ``setting_invalid`` now for a file that cannot be loaded.
    """
    if extra is not None:
        _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), extra)
    return partial(external_context, extra)


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    with map_exceptions(
        lambda error: SettingError(
            f"OCTOLLM_TLS_CERT ({certificate}) and OCTOLLM_TLS_KEY ({key}) must be a certificate with its chain and its"
            f" key, without a password, in PEM: {_error_text(error)}."
        ),
        OSError,
        ValueError,
    ):
        context.load_cert_chain(certificate, key, password=_refuse_password)


def _load_authorities(context: ssl.SSLContext, ca: Path | None) -> None:
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return
    with map_exceptions(
        lambda error: SettingError(
            f"OCTOLLM_TLS_CA ({ca}) must be one or several certificates in PEM: {_error_text(error)}."
        ),
        OSError,
    ):
        context.load_verify_locations(ca)


def _refuse_password() -> str:
    # Without this callback OpenSSL would prompt on the terminal.
    raise ValueError("it has a password")


def _error_text(error: Exception) -> str:
    return getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error)
