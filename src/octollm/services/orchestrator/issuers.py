"""Which OpenID Connect issuers are believed, and what their claims grant: a TOML file, and rules without I/O."""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octollm.capability import Principal
from octollm.errors import OctoError, SettingError

MAX_ISSUERS = 16
RESERVED_TENANTS = frozenset({"local", "system"})
"""Tenants that no claim of an issuer can name."""
_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_Text = Annotated[str, Meta(min_length=1, max_length=512)]

Algorithm = Literal["RS256", "PS256", "ES256", "EdDSA"]


class GrantRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whoever has ``value`` in ``claim`` (the text itself, or one of a list) is granted ``scope``."""

    claim: _Text
    value: _Text
    scope: _Text


class Issuer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One issuer. ``audience`` is our client id there; ``tenant`` whose its users are, or the claim that says so.

    Without a rule nobody is granted anything.
    """

    url: Annotated[str, Meta(pattern=r"\Ahttps?://[!-~]{1,500}\Z")]
    audience: _Text
    grant: Annotated[tuple[GrantRule, ...], Meta(min_length=1, max_length=64)]
    tenant: Annotated[str, Meta(pattern=rf"\A{_TENANT.pattern}\Z")] | None = None
    tenant_claim: _Text | None = None
    client_secret_file: _Text | None = None
    """Where the secret is that the issuer gave us, for those that want one when a code is redeemed."""
    algorithms: tuple[Algorithm, ...] = ("RS256", "PS256", "ES256", "EdDSA")


class _IssuersFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issuer: Annotated[tuple[Issuer, ...], Meta(min_length=1, max_length=MAX_ISSUERS)]


def load_issuers(path: Path) -> tuple[Issuer, ...]:
    """Return the issuers of a file; raise ``setting_invalid`` with the place of a fault."""
    try:
        found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _IssuersFile).issuer
    except OSError as error:
        raise SettingError(f"OCTOLLM_OIDC: {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise SettingError(f"OCTOLLM_OIDC: {path}: {error}") from error
    for issuer in found:
        if (issuer.tenant is None) == (issuer.tenant_claim is None):
            raise SettingError(f"OCTOLLM_OIDC: {path}: {issuer.url} needs either tenant or tenant_claim.")
        if issuer.url.startswith("http://") and not _is_loopback_url(issuer.url):
            raise SettingError(f"OCTOLLM_OIDC: {path}: {issuer.url} must be reached by https.")
    if len({issuer.url for issuer in found}) != len(found):
        raise SettingError(f"OCTOLLM_OIDC: {path}: an issuer is there twice.")
    return found


def load_client_secret(issuer: Issuer) -> str | None:
    """Return our secret at an issuer, ``None`` where there is none; raise ``setting_invalid`` for a wrong file."""
    if issuer.client_secret_file is None:
        return None
    path = Path(issuer.client_secret_file)
    try:
        if os.name == "posix" and path.stat().st_mode & 0o007:
            raise SettingError(f"{path} holds a secret and every user may read it. Run `chmod o-rwx {path}`.")
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"OCTOLLM_OIDC: {path} cannot be read as a secret.") from error
    if not secret or len(secret) > 1024 or not secret.isprintable():
        raise SettingError(f"OCTOLLM_OIDC: {path} is no secret.")
    return secret


def map_claims_to_scopes(issuer: Issuer, claims: Mapping[str, Any]) -> str:
    """Return what the claims of a user grant, presets and scopes; empty for nothing."""
    granted = [rule.scope for rule in issuer.grant if _claim_has(claims.get(rule.claim), rule.value)]
    return " ".join(dict.fromkeys(" ".join(granted).split()))


def map_claims_to_principal(issuer: Issuer, claims: Mapping[str, Any]) -> Principal:
    """Return whom the claims stand for. Raises ``login_refused`` where they name no tenant of theirs."""
    tenant = issuer.tenant
    if tenant is None:
        told = claims.get(issuer.tenant_claim or "")
        if not isinstance(told, str) or _TENANT.fullmatch(told) is None or told in RESERVED_TENANTS:
            raise OctoError(f"The login names no tenant in its claim {issuer.tenant_claim}.", code="login_refused")
        tenant = told
    # An issuer's `sub` may be any text, and two issuers may use the same one (OpenID Connect Core section 2).
    parts = (issuer.url, str(claims["sub"]), tenant)
    name = "oidc-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
    return Principal(name, name, tenant)


def map_claims_to_name(claims: Mapping[str, Any]) -> str:
    """Return how a user is called in lists."""
    for claim in ("email", "preferred_username", "name"):
        told = claims.get(claim)
        if isinstance(told, str) and told.isprintable() and 0 < len(told) <= 100:
            return told
    return "OpenID Connect"


def _claim_has(told: object, value: str) -> bool:
    return told == value or (isinstance(told, list) and value in told)


def _is_loopback_url(url: str) -> bool:
    return re.fullmatch(r"http://(?:127\.0\.0\.1|localhost|\[::1\])(?::[0-9]+)?(?:/.*)?", url) is not None
