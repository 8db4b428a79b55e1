"""The HTTP transport to external services (model providers, the model hub, collectors), and what its failures mean.

External services are reached through the environment's proxies, with the system's certificate authorities. This is the
boundary of the HTTP library (pyqwest): its exceptions are told apart here and nowhere else.
"""

from __future__ import annotations

from typing import Literal

from pyqwest import (
    ConnectTimeout,
    HTTPTransport,
    ReadError,
    RemoteProtocolError,
    TooManyRedirects,
    WriteError,
)

TRANSPORT_ERRORS = (ConnectionError, TimeoutError, ReadError, WriteError, RemoteProtocolError, TooManyRedirects)
"""What a call of the library may raise."""

TransportFailure = Literal["connect_timeout", "connect_failed", "timeout", "connection_lost"]


def create_external_transport(
    *, connect_timeout: float, read_timeout: float, follow_redirects: bool = False, decompress: bool = True
) -> HTTPTransport:
    """Return a transport for external requests; ``read_timeout`` is the longest silence of a response, in seconds.

    It follows no redirects unless told so: one would carry an API key to another host. Without ``decompress`` the
    content arrives as it is stored, so that byte ranges can be resumed.
    """
    return HTTPTransport(
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        tls_include_system_certs=True,
        follow_redirects=follow_redirects,
        enable_cookie_store=False,
        enable_gzip=decompress,
        enable_brotli=decompress,
        enable_zstd=decompress,
        enable_otel=False,
    )


def classify_failure(error: Exception) -> TransportFailure:
    """Return what one of :data:`TRANSPORT_ERRORS` means."""
    # It is a ConnectionError and a TimeoutError as well.
    if isinstance(error, ConnectTimeout):
        return "connect_timeout"
    if isinstance(error, ConnectionError):
        return "connect_failed"
    return "timeout" if isinstance(error, TimeoutError) else "connection_lost"
