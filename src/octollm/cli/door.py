"""The public door, as the command line uses it: the same API as any other client's."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import TypeVar
from urllib.parse import quote

import msgspec

from octollm.config import Settings
from octollm.contracts.operations import StoredFile
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.installation.home import read_local_key, running_in
from octollm.rpc.http import Answer, Http, TransportError
from octollm.rpc.problems import error_from_response

T = TypeVar("T")

ANSWER_SECONDS = 30.0
UPLOAD_SECONDS = 120.0
LOOK_SECONDS = 2.0


class Door:
    """Calls the public API at ``url``, showing ``key`` if there is one."""

    def __init__(self, url: str, key: str | None, http: Http) -> None:
        self.url = url
        self.key = key
        self._http = http

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that open the door."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def http(self) -> Http:
        """Return the client, for what is read as it comes."""
        return self._http

    async def get(self, path: str, kind: type[T]) -> T:
        """Return what is at ``path``. Raises what the door answers, and ``unavailable`` when nobody does."""
        return self._decoded(await self.send("GET", path), kind)

    async def post(self, path: str, body: object, kind: type[T]) -> T:
        """Send ``body`` (``None``: nothing) and return the answer."""
        encoded = b"" if body is None else msgspec.json.encode(body)
        return self._decoded(await self.send("POST", path, encoded, {"Content-Type": "application/json"}), kind)

    async def upload(self, name: str, content: bytes, media_type: str) -> StoredFile:
        """Store a file."""
        headers = {"Content-Type": media_type, "X-File-Name": quote(name)}
        return self._decoded(await self.send("POST", "/files", content, headers, UPLOAD_SECONDS), StoredFile)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> Answer:
        """Send a request; a status of 400 or more is raised as the door's own words."""
        try:
            answer = await self._http.send(
                method, self.url + path, {**self.headers, **(headers or {})}, body, seconds=seconds
            )
        except TransportError as error:
            raise self.away(error) from error
        if answer.status >= 400:
            raise error_from_response("The public door", answer.status, answer.body, answer.headers.get("retry-after"))
        return answer

    def away(self, error: TransportError) -> OctoError:
        """Return what to say when there is no answer."""
        if error.began:
            return OctoError(f"{error.detail} See whether it still runs: {self.url}/ready", code=error.code)
        return OctoError(
            f"No OctoLLM answers at {self.url}. Start one with `octollm up` in another terminal, or set OCTOLLM_URL"
            " to where one runs.",
            code="unavailable",
        )

    def _decoded(self, answer: Answer, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OctoError(
                f"What answers at {self.url} is not an OctoLLM of this version. Is another program on that port?",
                code="peer_protocol",
            ) from error


async def nothing_runs(settings: Settings) -> bool:
    """Say whether no installation answers on this machine, and none elsewhere is meant."""
    if settings.url is not None or await running_in(settings.home) is not None:
        return False
    async with open_door(settings) as door:
        try:
            await door.http.send("GET", f"{door.url}/health", {}, None, seconds=LOOK_SECONDS)
        except TransportError as error:
            return error.code == "connect_failed"
        return False


@contextlib.asynccontextmanager
async def open_door(settings: Settings) -> AsyncGenerator[Door]:
    """Open the door that the settings name: ``OCTOLLM_URL``, else this machine's.

    The home's own key is shown only to the process that holds this home, and only when it wants one.
    """
    url, key = settings.url, settings.api_key
    if url is None:
        running = await running_in(settings.home)
        url = running.url if running else f"http://127.0.0.1:{SERVICES['reflex'].port + settings.port_shift}"
        if running and key is None and not settings.local_trust:
            key = read_local_key(settings.home)
    async with Http() as http:
        yield Door(url, key, http)
