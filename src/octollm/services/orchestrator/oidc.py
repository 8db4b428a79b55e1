"""OpenID Connect: the configured issuers, the mapping of claims to tenant and scopes, and the client that verifies their tokens and exchanges login codes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode

import jwt
import msgspec
from msgspec import Meta

from octollm.capability import Principal
from octollm.clock import Clock
from octollm.contracts.auth import IssuerView, LoginCode
from octollm.errors import OctoError, SettingError
from octollm.resilience import Deadline
from octollm.rpc.external import ExternalClient
from octollm.rpc.http_client import HttpClient

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


JWKS_TTL_SECONDS = 3600.0
"""How long an issuer's keys are believed without being asked for again."""
JWKS_REFRESH_INTERVAL = 30.0
"""For a key that is not known they are asked for again at most so often."""
ISSUER_TIMEOUT = 5.0
MAX_TOKEN_LENGTH = 8_192
MAX_RESPONSE_BYTES = 262_144
MAX_JWKS_KEYS = 64
CLOCK_SKEW_SECONDS = 30
MAX_TOKEN_AGE_SECONDS = 86_400
"""Nobody is believed by a token that was issued longer ago, whatever it says of its end."""
_JWT_OPTIONS: Any = {
    "require": ["exp", "iat", "iss", "aud", "sub"],
    # Times are checked below, on the clock that was injected.
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
}
_TOKEN_TYPES = frozenset({"JWT", "AT+JWT", "APPLICATION/AT+JWT"})


class _ProviderMetadata(msgspec.Struct, frozen=True):
    """What is needed of OpenID Connect Discovery 1.0 section 3."""

    issuer: str
    jwks_uri: str
    authorization_endpoint: str = ""
    token_endpoint: str = ""


class _TokenResponse(msgspec.Struct, frozen=True):
    """What is needed of the answer to a code (OpenID Connect Core section 3.1.3.3)."""

    id_token: str


class _Jwks(msgspec.Struct, frozen=True):
    keys: list[dict[str, Any]]


@dataclass(slots=True)
class _IssuerCache:
    keys: dict[str, jwt.PyJWK] = field(default_factory=dict[str, jwt.PyJWK])
    metadata: _ProviderMetadata = field(default_factory=lambda: _ProviderMetadata("", ""))
    fetched_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class OidcClient:
    """Verifies ID and access tokens (JWT) of the issuers that are configured, and of no others."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        http: HttpClient,
        external_clients: Mapping[str, ExternalClient],
        clock: Clock,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """``secrets`` are ours at issuers that want one, by their URL."""
        self._secrets = dict(secrets or {})
        self._issuers = {issuer.url: issuer for issuer in issuers}
        self._http = http
        self._external_clients = external_clients
        self._clock = clock
        self._cache = {url: _IssuerCache() for url in self._issuers}

    async def verify(self, token: str) -> tuple[Issuer, Mapping[str, Any]]:
        """Return who issued a token, and its claims.

        Raises ``api_key_invalid`` for one that is not good, without saying why, and ``unavailable`` while the issuer
        cannot be asked for its keys.
        """
        try:
            issuer, header = self._parse_unverified(token)
            key = await self._find_key(issuer, header)
            claims = jwt.decode(
                token,
                key=key,
                algorithms=list(issuer.algorithms),
                audience=issuer.audience,
                issuer=issuer.url,
                leeway=CLOCK_SKEW_SECONDS,
                options=_JWT_OPTIONS,
            )
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _invalid_login() from error
        self._validate_claims(issuer, claims)
        return issuer, claims

    async def exchange_code(self, login: LoginCode) -> tuple[Issuer, Mapping[str, Any]]:
        """Return who logged in, by the code that the browser came back with (RFC 6749 section 4.1.3, RFC 7636).

        Raises ``api_key_invalid`` for a code, verifier or nonce that is not good, ``unavailable`` while the issuer
        cannot be asked.
        """
        issuer = self._issuers.get(login.issuer)
        if issuer is None:
            raise _invalid_login()
        await self._refresh_if_stale(issuer)
        place = self._cache[issuer.url].metadata.token_endpoint
        if not self._is_trusted_url(issuer, place):
            raise OctoError(f"{issuer.url} names no place where a code is redeemed.", code="peer_protocol")
        form = {
            "grant_type": "authorization_code",
            "code": login.code,
            "redirect_uri": login.redirect_uri,
            "client_id": issuer.audience,
            "code_verifier": login.verifier,
        }

        async def once() -> bytes:
            headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
            if (secret := self._secrets.get(issuer.url)) is not None:
                # RFC 6749 section 2.3.1
                named = f"{quote(issuer.audience, safe='')}:{quote(secret, safe='')}"
                headers["Authorization"] = "Basic " + base64.b64encode(named.encode()).decode()
            answer = await self._http.send("POST", place, headers, urlencode(form).encode(), seconds=ISSUER_TIMEOUT)
            if answer.status >= 500:
                raise OctoError(f"{issuer.url} answers {answer.status}.", code="unavailable")
            if answer.status != 200 or len(answer.body) > MAX_RESPONSE_BYTES:
                raise _invalid_login()
            return answer.body

        deadline = Deadline.after(self._clock, ISSUER_TIMEOUT)
        # A code is good once: it is not sent again.
        body = await self._external_clients[issuer.url].call("code", once, deadline, is_repeatable=lambda: False)
        try:
            token = msgspec.json.decode(body, type=_TokenResponse).id_token
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise _invalid_login() from None
        found, claims = await self.verify(token)
        told = claims.get("nonce")
        good = isinstance(told, str) and hmac.compare_digest(told.encode(), login.nonce.encode())
        if found is not issuer or not good:
            raise _invalid_login()
        return found, claims

    async def list_issuers(self) -> tuple[IssuerView, ...]:
        """Return the issuers at which a browser can log in, of those that answer."""
        found: list[IssuerView] = []
        for issuer in self._issuers.values():
            with contextlib.suppress(OctoError):
                await self._refresh_if_stale(issuer)
                place = self._cache[issuer.url].metadata.authorization_endpoint
                if self._is_trusted_url(issuer, place):
                    found.append(IssuerView(issuer.url, issuer.audience, place))
        return tuple(found)

    async def _refresh_if_stale(self, issuer: Issuer, kid: str | None = None) -> None:
        """Ask an issuer for what is known of it, and for the key ``kid``, where that is due."""
        known = self._cache[issuer.url]
        if self._is_stale(known, kid):
            async with known.lock:
                if self._is_stale(known, kid):
                    await self._fetch_metadata(issuer, known)

    def _is_trusted_url(self, issuer: Issuer, url: str) -> bool:
        """Say whether a place that an issuer names is reached as safely as the issuer itself."""
        return url.partition("://")[0] in ("https", issuer.url.partition("://")[0])

    def _parse_unverified(self, token: str) -> tuple[Issuer, Mapping[str, Any]]:
        """Return whose a token says that it is, and its header. Nothing of it is believed yet."""
        if len(token) > MAX_TOKEN_LENGTH or token.count(".") != 2:
            raise _invalid_login()
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
        issuer = self._issuers.get(str(claims.get("iss")))
        typ = str(header.get("typ", "JWT")).upper()
        if issuer is None or "crit" in header or typ not in _TOKEN_TYPES or header.get("alg") not in issuer.algorithms:
            raise _invalid_login()
        return issuer, header

    def _validate_claims(self, issuer: Issuer, claims: Mapping[str, Any]) -> None:
        """Check the times on our clock (RFC 7519 section 4.1), and who it is for (OpenID Connect Core 3.1.3.7)."""
        now = self._clock.now()
        times = [claims["exp"], claims["iat"], claims.get("nbf", claims["iat"])]
        if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in times):
            raise _invalid_login()
        exp, iat, nbf = times
        several = not isinstance(claims["aud"], str) and claims["aud"] != [issuer.audience]
        good = (
            now - CLOCK_SKEW_SECONDS < exp
            and iat - CLOCK_SKEW_SECONDS <= now
            and nbf - CLOCK_SKEW_SECONDS <= now
            and now - iat <= MAX_TOKEN_AGE_SECONDS
            and isinstance(claims["sub"], str)
            and 0 < len(claims["sub"]) <= 255
            and claims.get("azp", issuer.audience if not several else None) == issuer.audience
        )
        if not good:
            raise _invalid_login()

    async def _find_key(self, issuer: Issuer, header: Mapping[str, Any]) -> jwt.PyJWK:
        """Return the key that a header names, of the kind that its algorithm wants.

        Where it names none, there must be one key for its algorithm (OpenID Connect Core section 10.1).
        """
        known = self._cache[issuer.url]
        kid = header.get("kid")
        if kid is not None and (not isinstance(kid, str) or len(kid) > 256):
            raise _invalid_login()
        await self._refresh_if_stale(issuer, kid)
        found = [key for key in known.keys.values() if key.algorithm_name == header["alg"]]
        if kid is not None:
            found = [key for key in found if key.key_id == kid]
        if len(found) != 1:
            raise _invalid_login()
        return found[0]

    def _is_stale(self, cache: _IssuerCache, kid: str | None) -> bool:
        age = self._age(cache)
        return age > JWKS_TTL_SECONDS or (kid is not None and kid not in cache.keys and age > JWKS_REFRESH_INTERVAL)

    def _age(self, cache: _IssuerCache) -> float:
        return self._clock.monotonic() - cache.fetched_at

    async def _fetch_metadata(self, issuer: Issuer, cache: _IssuerCache) -> None:
        """Ask an issuer for its keys; those that were known stay while it does not answer, for as long as they may."""

        async def once() -> tuple[_ProviderMetadata, dict[str, jwt.PyJWK]]:
            place = f"{issuer.url.rstrip('/')}/.well-known/openid-configuration"
            found = await self._get_json(place, _ProviderMetadata)
            if found.issuer != issuer.url:
                raise OctoError(f"{issuer.url} says that it is another issuer.", code="peer_protocol")
            if not self._is_trusted_url(issuer, found.jwks_uri):
                raise OctoError(f"{issuer.url} has its keys at a place that is not believed.", code="peer_protocol")
            return found, _parse_jwks((await self._get_json(found.jwks_uri, _Jwks)).keys, issuer)

        deadline = Deadline.after(self._clock, ISSUER_TIMEOUT)
        asked = self._external_clients[issuer.url].call("keys", once, deadline, is_repeatable=lambda: True)
        cache.metadata, cache.keys = await asked
        cache.fetched_at = self._clock.monotonic()

    async def _get_json(self, url: str, kind: Any) -> Any:
        answer = await self._http.send("GET", url, {"Accept": "application/json"}, None, seconds=ISSUER_TIMEOUT)
        if answer.status != 200 or len(answer.body) > MAX_RESPONSE_BYTES:
            code = "unavailable" if answer.status >= 500 else "peer_protocol"
            raise OctoError(f"{url} answers {answer.status}.", code=code)
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OctoError(f"{url} answers in another form than agreed.", code="peer_protocol") from error


def _parse_jwks(jwks: Sequence[Mapping[str, Any]], issuer: Issuer) -> dict[str, jwt.PyJWK]:
    """Return the keys for signatures by an algorithm that is believed (RFC 7517 section 4)."""
    found: dict[str, jwt.PyJWK] = {}
    for jwk in jwks[:MAX_JWKS_KEYS]:
        kid = jwk.get("kid")
        if not isinstance(kid, str) or jwk.get("use", "sig") != "sig" or jwk.get("kty") == "oct":
            continue
        try:
            key = jwt.PyJWK(dict(jwk), algorithm=_default_algorithm(jwk))
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue  # of a kind that is not known here
        if key.algorithm_name in issuer.algorithms:
            found[kid] = key
    return found


def _default_algorithm(jwk: Mapping[str, Any]) -> str | None:
    """Return the algorithm that a key is for; where it does not say so, the usual one of its kind."""
    if jwk.get("alg") is not None:
        return None
    return {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}.get(str(jwk.get("kty")))


def _invalid_login() -> OctoError:
    return OctoError("The login is not valid here, or has expired: log in again.", code="api_key_invalid")
