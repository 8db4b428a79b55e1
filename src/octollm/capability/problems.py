"""The one error of this package, and the table of its reasons."""

from __future__ import annotations

from octollm.errors import OctoError

_MALFORMED = "token_malformed"
_INVALID = "token_invalid"

REASONS: dict[str, str] = {
    # A bearer string or token has the wrong form
    "bearer_missing": "token_missing",
    "bearer_too_large": _MALFORMED,
    "bearer_malformed": _MALFORMED,
    "too_many_parts": _MALFORMED,
    "base64_malformed": _MALFORMED,
    "json_malformed": _MALFORMED,
    "header_malformed": _MALFORMED,
    "algorithm_refused": _MALFORMED,
    "type_wrong": _MALFORMED,
    "claims_malformed": _MALFORMED,
    # Time
    "expired": "token_expired",
    "not_yet_valid": _INVALID,
    "issued_in_future": _INVALID,
    "lives_too_long": _INVALID,
    # Who signed it
    "root_unknown": _INVALID,
    "key_unexpected": _INVALID,
    "key_missing": _INVALID,
    "key_mismatch": _INVALID,
    "signature_invalid": _INVALID,
    # How the links fit together
    "audience_wrong": _INVALID,
    "issuer_wrong": _INVALID,
    "proof_mismatch": _INVALID,
    "grant_mismatch": _INVALID,
    "part_unused": _INVALID,
    "subject_differs": _INVALID,
    "task_differs": _INVALID,
    "outlives_parent": _INVALID,
    "older_than_parent": _INVALID,
    # What it allows
    "scope_foreign": _INVALID,
    "scope_exceeds_parent": _INVALID,
    "may_exceeds_parent": _INVALID,
    "may_exceeds_scope": _INVALID,
    "may_empty": _INVALID,
    "revoked": "token_revoked",
    "scope_not_allowed": "scope_missing",
    "service_unknown": _INVALID,
    # What was asked of a minter, or written by hand
    "not_in_may": "authority_missing",
    "grant_absent": "authority_missing",
    "holder_unknown": "authority_missing",
    "does_not_fit": "authority_missing",
    "scope_malformed": "invalid_parameter",
    "may_malformed": "invalid_parameter",
    "may_too_large": "invalid_parameter",
    "key_malformed": "invalid_parameter",
    "misuse": "internal",
}
"""Every inner reason and the code that the caller sees."""

_CODE_DETAILS = {
    "token_missing": "Send a capability token as a bearer token.",
    "token_malformed": "The bearer token does not have the form of a capability token.",
    "token_expired": "The bearer token has expired; ask for a new one.",
    "token_invalid": "The bearer token is not valid for this service.",
    "token_revoked": "The bearer token was revoked.",
    "scope_missing": "The bearer token does not allow this operation.",
    "authority_missing": "The authority for a needed call is missing.",
    "invalid_parameter": "A scope, authority tree or key is malformed.",
    "internal": "A token could not be made.",
}


class CapabilityError(OctoError):
    """A refusal.

    ``reason`` is one of :data:`REASONS`: for logs and tests, never sent on the wire. Without ``detail`` the
    text is the same for every reason of a code, so that a prober learns nothing from it.
    """

    def __init__(self, reason: str, detail: str | None = None, *, code: str | None = None) -> None:
        outer = REASONS[reason] if code is None else code
        super().__init__(_CODE_DETAILS[outer] if detail is None else detail, code=outer)
        self.reason = reason
