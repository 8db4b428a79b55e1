"""A session of the page: a cookie that its scripts cannot read, for a row that can be ended."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

SESSION_PREFIX = "octosess_"
SESSION_SECONDS = 12 * 3600


class SessionRequest(msgspec.Struct, frozen=True):
    """``POST /session``: an API key, whose session is opened."""

    api_key: Annotated[str, Meta(min_length=1, max_length=8192)]


class WhoAmI(msgspec.Struct, frozen=True):
    """``GET /session``: who the caller is at the door."""

    tenant: str
    scope: str
    session: bool = False
    """It is shown a session, which can be ended."""


class OpenSession(msgspec.Struct, frozen=True):
    """``POST orchestrator/sessions`` by the public door: the credential that a session is opened for."""

    subject_token: Annotated[str, Meta(min_length=1, max_length=8192)]


class EndSession(msgspec.Struct, frozen=True):
    """``POST orchestrator/sessions/end`` by the public door."""

    session: Annotated[str, Meta(min_length=1, max_length=512)]


class SessionAnswer(msgspec.Struct, frozen=True):
    """A session that was opened: its credential, which goes into the cookie alone, and how long it lasts (seconds)."""

    session: str
    expires_in: int
    tenant: str
    scope: str
