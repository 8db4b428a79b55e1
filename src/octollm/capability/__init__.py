"""Capability tokens: scopes, the tokens that carry them, and their attenuation from call to call.

Every decision follows from values passed in: keys, tokens, a clock, a set of revocations. Nothing here does I/O,
waits, or holds a key that it was not given.
"""

from octollm.capability.errors import REASONS, CapabilityError
from octollm.capability.grants import (
    BUILT_IN_CALLS,
    Declarations,
    DeclaredCall,
    DelegationTree,
    attenuate,
    contains,
    intersect,
    parse_delegation_tree,
    union,
)
from octollm.capability.jose import PublicKey, SigningKey, digest_of, to_jwks
from octollm.capability.minting import CallTokens, Delegator, RootMinter, ServiceTokenSigner
from octollm.capability.revocations import RevocationKind, Revocations, run_value
from octollm.capability.scopes import PRESETS, Principal, Scope, ScopeSet, parse_scope, preset_scopes
from octollm.capability.service_tokens import Directory, DirectoryEntry, verify_directory, verify_service_token
from octollm.capability.tokens import AccessClaims, GrantClaims, TaskRef
from octollm.capability.verification import VerifiedChain, Verifier

__all__ = [  # noqa: RUF022  (grouped by what they are for)
    # Scopes and trees of authority
    "Scope",
    "ScopeSet",
    "parse_scope",
    "DelegationTree",
    "parse_delegation_tree",
    "contains",
    "union",
    "intersect",
    "attenuate",
    "DeclaredCall",
    "Declarations",
    "BUILT_IN_CALLS",
    # Principals
    "Principal",
    "PRESETS",
    "preset_scopes",
    # Keys
    "SigningKey",
    "PublicKey",
    "digest_of",
    "to_jwks",
    # Minting
    "RootMinter",
    "Delegator",
    "CallTokens",
    "ServiceTokenSigner",
    # Verifying
    "Verifier",
    "VerifiedChain",
    "Revocations",
    "RevocationKind",
    "run_value",
    "AccessClaims",
    "GrantClaims",
    "TaskRef",
    "Directory",
    "DirectoryEntry",
    "verify_service_token",
    "verify_directory",
    # Refusals
    "CapabilityError",
    "REASONS",
]
