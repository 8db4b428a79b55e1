"""What the failure of a try says: of trying again, and of the instance that was called."""

from __future__ import annotations

from octollm.errors import OctoError, RemoteError
from octollm.resilience import CallFailure, CallOutcome
from octollm.rpc.http import TransportError

SHED_CODES = frozenset({"overloaded", "draining", "rate_limited"})
"""Refusals that come before a handler runs. Other problems may be passed on from further down."""
OUTAGE_CODES = SHED_CODES | {"connect_failed", "connect_timeout", "connection_lost", "pool_timeout", "unavailable"}
"""Failures of a service that is not there just now, or of one that it needs: it may be there soon."""


def classify_failure(error: OctoError) -> CallFailure:
    """Return what a failure says of whether to try again."""
    if isinstance(error, TransportError):
        return CallFailure(retryable=True, may_have_started=error.request_sent, is_outage=error.code in OUTAGE_CODES)
    if isinstance(error, RemoteError):
        return CallFailure(
            error.retryable, error.code not in SHED_CODES, error.retry_after, is_outage=error.code in OUTAGE_CODES
        )
    # Ours: no instance could be called.
    return CallFailure(
        retryable=False, may_have_started=False, retry_after=error.retry_after, is_outage=error.code in OUTAGE_CODES
    )


def classify_outcome(error: OctoError) -> CallOutcome:
    """Return what a failure says of the instance that was called."""
    if isinstance(error, TransportError):
        return "unknown" if error.code == "pool_timeout" else "failed"
    if isinstance(error, RemoteError):
        return "erred" if error.code in ("internal", "peer_protocol") and error.status >= 500 else "answered"
    if error.code == "deadline_exceeded":
        return "late"
    return "erred" if error.code == "peer_protocol" else "unknown"
