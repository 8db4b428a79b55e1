"""Believing the tokens of OpenID Connect issuers: their keys are found by discovery, cached, and asked for seldom."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import jwt
import msgspec

from octollm.clock import Clock
from octollm.contracts.session import IssuerView, LoginCode
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.http import Http
from octollm.rpc.outside import Outside
from octollm.services.orchestrator.issuers import Issuer

KEYS_SECONDS = 3600.0
"""How long an issuer's keys are believed without being asked for again."""
AGAIN_SECONDS = 30.0
"""For a key that is not known they are asked for again at most so often."""
ASK_SECONDS = 5.0
MAX_TOKEN = 8_192
MAX_ANSWER = 262_144
MAX_KEYS = 64
SKEW_SECONDS = 30
MAX_AGE_SECONDS = 86_400
"""Nobody is believed by a token that was issued longer ago, whatever it says of its end."""
_OPTIONS: Any = {
    "require": ["exp", "iat", "iss", "aud", "sub"],
    # Times are checked below, on the clock that was injected.
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
}
_TYPES = frozenset({"JWT", "AT+JWT", "APPLICATION/AT+JWT"})


class _Discovery(msgspec.Struct, frozen=True):
    """What is needed of OpenID Connect Discovery 1.0 section 3."""

    issuer: str
    jwks_uri: str
    authorization_endpoint: str = ""
    token_endpoint: str = ""


class _Redeemed(msgspec.Struct, frozen=True):
    """What is needed of the answer to a code (OpenID Connect Core section 3.1.3.3)."""

    id_token: str


class _Keys(msgspec.Struct, frozen=True):
    keys: list[dict[str, Any]]


@dataclass(slots=True)
class _Known:
    keys: dict[str, jwt.PyJWK] = field(default_factory=dict[str, jwt.PyJWK])
    places: _Discovery = field(default_factory=lambda: _Discovery("", ""))
    asked_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Oidc:
    """Verifies ID and access tokens (JWT) of the issuers that are configured, and of no others."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        http: Http,
        outside: Mapping[str, Outside],
        clock: Clock,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """``secrets`` are ours at issuers that want one, by their URL."""
        self._secrets = dict(secrets or {})
        self._issuers = {issuer.url: issuer for issuer in issuers}
        self._http = http
        self._outside = outside
        self._clock = clock
        self._known = {url: _Known() for url in self._issuers}

    async def verify(self, token: str) -> tuple[Issuer, Mapping[str, Any]]:
        """Return who issued a token, and its claims.

        Raises ``api_key_invalid`` for one that is not good, without saying why, and ``unavailable`` while the issuer
        cannot be asked for its keys.
        """
        try:
            issuer, header = self._read(token)
            key = await self._key(issuer, header)
            claims = jwt.decode(
                token,
                key=key,
                algorithms=list(issuer.algorithms),
                audience=issuer.audience,
                issuer=issuer.url,
                leeway=SKEW_SECONDS,
                options=_OPTIONS,
            )
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _refused() from error
        self._check(issuer, claims)
        return issuer, claims

    async def redeem(self, login: LoginCode) -> tuple[Issuer, Mapping[str, Any]]:
        """Return who logged in, by the code that the browser came back with (RFC 6749 section 4.1.3, RFC 7636).

        Raises ``api_key_invalid`` for a code, verifier or nonce that is not good, ``unavailable`` while the issuer
        cannot be asked.
        """
        issuer = self._issuers.get(login.issuer)
        if issuer is None:
            raise _refused()
        await self._ready(issuer)
        place = self._known[issuer.url].places.token_endpoint
        if not self._believed(issuer, place):
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
            answer = await self._http.send("POST", place, headers, urlencode(form).encode(), seconds=ASK_SECONDS)
            if answer.status >= 500:
                raise OctoError(f"{issuer.url} answers {answer.status}.", code="unavailable")
            if answer.status != 200 or len(answer.body) > MAX_ANSWER:
                raise _refused()
            return answer.body

        deadline = Deadline.after(self._clock, ASK_SECONDS)
        # A code is good once: it is not sent again.
        body = await self._outside[issuer.url].call("code", once, deadline, repeats=lambda: False)
        try:
            token = msgspec.json.decode(body, type=_Redeemed).id_token
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise _refused() from None
        found, claims = await self.verify(token)
        told = claims.get("nonce")
        good = isinstance(told, str) and hmac.compare_digest(told.encode(), login.nonce.encode())
        if found is not issuer or not good:
            raise _refused()
        return found, claims

    async def views(self) -> tuple[IssuerView, ...]:
        """Return the issuers at which a browser can log in, of those that answer."""
        found: list[IssuerView] = []
        for issuer in self._issuers.values():
            with contextlib.suppress(OctoError):
                await self._ready(issuer)
                place = self._known[issuer.url].places.authorization_endpoint
                if self._believed(issuer, place):
                    found.append(IssuerView(issuer.url, issuer.audience, place))
        return tuple(found)

    async def _ready(self, issuer: Issuer, kid: str | None = None) -> None:
        """Ask an issuer for what is known of it, and for the key ``kid``, where that is due."""
        known = self._known[issuer.url]
        if self._is_stale(known, kid):
            async with known.lock:
                if self._is_stale(known, kid):
                    await self._ask(issuer, known)

    def _believed(self, issuer: Issuer, place: str) -> bool:
        """Say whether a place that an issuer names is reached as safely as the issuer itself."""
        return place.partition("://")[0] in ("https", issuer.url.partition("://")[0])

    def _read(self, token: str) -> tuple[Issuer, Mapping[str, Any]]:
        """Return whose a token says that it is, and its header. Nothing of it is believed yet."""
        if len(token) > MAX_TOKEN or token.count(".") != 2:
            raise _refused()
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
        issuer = self._issuers.get(str(claims.get("iss")))
        typ = str(header.get("typ", "JWT")).upper()
        if issuer is None or "crit" in header or typ not in _TYPES or header.get("alg") not in issuer.algorithms:
            raise _refused()
        return issuer, header

    def _check(self, issuer: Issuer, claims: Mapping[str, Any]) -> None:
        """Check the times on our clock (RFC 7519 section 4.1), and who it is for (OpenID Connect Core 3.1.3.7)."""
        now = self._clock.now()
        times = [claims["exp"], claims["iat"], claims.get("nbf", claims["iat"])]
        if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in times):
            raise _refused()
        exp, iat, nbf = times
        several = not isinstance(claims["aud"], str) and claims["aud"] != [issuer.audience]
        good = (
            now - SKEW_SECONDS < exp
            and iat - SKEW_SECONDS <= now
            and nbf - SKEW_SECONDS <= now
            and now - iat <= MAX_AGE_SECONDS
            and isinstance(claims["sub"], str)
            and 0 < len(claims["sub"]) <= 255
            and claims.get("azp", issuer.audience if not several else None) == issuer.audience
        )
        if not good:
            raise _refused()

    async def _key(self, issuer: Issuer, header: Mapping[str, Any]) -> jwt.PyJWK:
        """Return the key that a header names, of the kind that its algorithm wants.

        Where it names none, there must be one key for its algorithm (OpenID Connect Core section 10.1).
        """
        known = self._known[issuer.url]
        kid = header.get("kid")
        if kid is not None and (not isinstance(kid, str) or len(kid) > 256):
            raise _refused()
        await self._ready(issuer, kid)
        found = [key for key in known.keys.values() if key.algorithm_name == header["alg"]]
        if kid is not None:
            found = [key for key in found if key.key_id == kid]
        if len(found) != 1:
            raise _refused()
        return found[0]

    def _is_stale(self, known: _Known, kid: str | None) -> bool:
        age = self._age(known)
        return age > KEYS_SECONDS or (kid is not None and kid not in known.keys and age > AGAIN_SECONDS)

    def _age(self, known: _Known) -> float:
        return self._clock.monotonic() - known.asked_at

    async def _ask(self, issuer: Issuer, known: _Known) -> None:
        """Ask an issuer for its keys; those that were known stay while it does not answer, for as long as they may."""

        async def once() -> tuple[_Discovery, dict[str, jwt.PyJWK]]:
            place = f"{issuer.url.rstrip('/')}/.well-known/openid-configuration"
            found = await self._get(place, _Discovery)
            if found.issuer != issuer.url:
                raise OctoError(f"{issuer.url} says that it is another issuer.", code="peer_protocol")
            if not self._believed(issuer, found.jwks_uri):
                raise OctoError(f"{issuer.url} has its keys at a place that is not believed.", code="peer_protocol")
            return found, _usable((await self._get(found.jwks_uri, _Keys)).keys, issuer)

        deadline = Deadline.after(self._clock, ASK_SECONDS)
        asked = self._outside[issuer.url].call("keys", once, deadline, repeats=lambda: True)
        known.places, known.keys = await asked
        known.asked_at = self._clock.monotonic()

    async def _get(self, url: str, kind: Any) -> Any:
        answer = await self._http.send("GET", url, {"Accept": "application/json"}, None, seconds=ASK_SECONDS)
        if answer.status != 200 or len(answer.body) > MAX_ANSWER:
            code = "unavailable" if answer.status >= 500 else "peer_protocol"
            raise OctoError(f"{url} answers {answer.status}.", code=code)
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OctoError(f"{url} answers in another form than agreed.", code="peer_protocol") from error


def _usable(jwks: Sequence[Mapping[str, Any]], issuer: Issuer) -> dict[str, jwt.PyJWK]:
    """Return the keys for signatures by an algorithm that is believed (RFC 7517 section 4)."""
    found: dict[str, jwt.PyJWK] = {}
    for jwk in jwks[:MAX_KEYS]:
        kid = jwk.get("kid")
        if not isinstance(kid, str) or jwk.get("use", "sig") != "sig" or jwk.get("kty") == "oct":
            continue
        try:
            key = jwt.PyJWK(dict(jwk), algorithm=_algorithm_of(jwk))
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue  # of a kind that is not known here
        if key.algorithm_name in issuer.algorithms:
            found[kid] = key
    return found


def _algorithm_of(jwk: Mapping[str, Any]) -> str | None:
    """Return the algorithm that a key is for; where it does not say so, the usual one of its kind."""
    if jwk.get("alg") is not None:
        return None
    return {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}.get(str(jwk.get("kty")))


def _refused() -> OctoError:
    return OctoError("The login is not valid here, or has expired: log in again.", code="api_key_invalid")
