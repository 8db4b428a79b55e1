"""CapabilityError, its reasons, and the code that a caller sees for each.

Reasons are for logs and for the holder of a token. A caller sees only the code, so that probing reveals nothing.
"""

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
    # Minting, and scopes or keys written by hand
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
"""Every internal reason and the code that the caller sees."""

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


REASON_TEXTS: dict[str, str] = {
    "bearer_missing": "There is no token.",
    "bearer_too_large": "The text is longer than any bearer string may be.",
    "bearer_malformed": "The text is not made of tokens of three parts each.",
    "too_many_parts": "There are more tokens in it than a chain may have.",
    "base64_malformed": "A part is not canonical base64url (RFC 7515 section 2).",
    "json_malformed": "A part is not JSON, or has a member twice, null, or too deep a nesting.",
    "header_malformed": "A header has members that do not belong there, such as `crit` or `jku`.",
    "algorithm_refused": "A header names another algorithm than EdDSA.",
    "type_wrong": "A token is of another type (`typ`) than its place asks for.",
    "claims_malformed": "The claims of a token are not those of its type.",
    "expired": "A link of the chain has expired.",
    "not_yet_valid": "A link of the chain is not valid yet (`nbf`).",
    "issued_in_future": "A link of the chain was issued later than now (`iat`).",
    "lives_too_long": "A link of the chain would live longer than its type may.",
    "root_unknown": "The first link is signed by a root key that is not pinned here.",
    "key_unexpected": "A link names a key in a way that its place does not allow.",
    "key_missing": "A link does not say by which key it is signed.",
    "key_mismatch": "A link is signed by another key than the grant before it confirms.",
    "signature_invalid": "A signature is wrong.",
    "audience_wrong": "The token is for another service.",
    "issuer_wrong": "A link was issued by another service than the grant before it names.",
    "proof_mismatch": "A link was minted under another grant than the one that came with it.",
    "grant_mismatch": "The callee's grant is another one than the access token names.",
    "part_unused": "There is a token in it that nothing ties to the chain.",
    "subject_differs": "A link is for another principal, credential or tenant than the rest.",
    "task_differs": "A link is for another task, step, attempt or run than the rest.",
    "outlives_parent": "A link ends later than the grant that it was minted under.",
    "older_than_parent": "A link is older than the grant that it was minted under.",
    "scope_foreign": "A scope belongs to another service than the token is for.",
    "scope_exceeds_parent": "The scope is not among the calls that the grant allows.",
    "may_exceeds_parent": "A grant allows more than the grant that it was minted under.",
    "may_exceeds_scope": "The callee's grant allows more than may follow the call's scope.",
    "may_empty": "A grant allows nothing, so it should not be there.",
    "revoked": "A link of the chain was revoked.",
    "scope_not_allowed": "The token does not allow that operation.",
    "service_unknown": "No service of that name is registered.",
    "not_in_may": "The grant does not allow the call.",
    "grant_absent": "There is no grant, so the work may not call on.",
    "holder_unknown": "The grant is for a key that is not here.",
    "does_not_fit": "The chain would be longer than a bearer string may be.",
    "scope_malformed": "A scope is malformed.",
    "may_malformed": "A tree of calls is malformed.",
    "may_too_large": "A tree of calls has too many levels or entries.",
    "key_malformed": "A key is malformed.",
    "misuse": "It was asked for something that no verifier would accept.",
}
"""A sentence for every reason of :data:`octollm.capability.REASONS`."""
