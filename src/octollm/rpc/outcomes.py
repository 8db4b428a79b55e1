"""What the failure of a try says: of trying again, and of the instance that was called."""

from __future__ import annotations

from octollm.errors import OctoError, RemoteError
from octollm.resilience import Failure, Outcome
from octollm.rpc.http import TransportError

SHED = frozenset({"overloaded", "draining", "rate_limited"})
"""Refusals that come before a handler runs. Other problems may be passed on from further down."""
AWAY = SHED | {"connect_failed", "connect_timeout", "connection_lost", "pool_timeout", "unavailable"}
"""Failures of a service that is not there just now, or of one that it needs: it may be there soon."""


def failure_of(error: OctoError) -> Failure:
    """Return what a failure says of whether to try again."""
    if isinstance(error, TransportError):
        return Failure(retryable=True, began=error.began, away=error.code in AWAY)
    if isinstance(error, RemoteError):
        return Failure(error.retryable, error.code not in SHED, error.retry_after, away=error.code in AWAY)
    # Ours: no instance could be called.
    return Failure(retryable=False, began=False, retry_after=error.retry_after, away=error.code in AWAY)


def outcome_of(error: OctoError) -> Outcome:
    """Return what a failure says of the instance that was called."""
    if isinstance(error, TransportError):
        return "unknown" if error.code == "pool_timeout" else "failed"
    if isinstance(error, RemoteError):
        return "erred" if error.code in ("internal", "peer_protocol") and error.status >= 500 else "answered"
    if error.code == "deadline_exceeded":
        return "late"
    return "erred" if error.code == "peer_protocol" else "unknown"
