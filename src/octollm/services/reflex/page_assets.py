"""The web page: its files, read from the package once, with their Content-Security-Policy and caching.

The page is plain ES modules. Their address has the digest of all of them, so a browser may keep each for ever, and a
new version of the page never mixes with an old one. Only ``/`` has to be asked for again.
"""

from __future__ import annotations

import gzip
import hashlib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octollm.errors import OctoError
from octollm.rpc.problems import problem_response
from octollm.rpc.responses import accepts_gzip, apply_etag

CSP = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy (level 3): scripts and styles come from the gateway's files only, none is inline."""
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".ts": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
INDEX = "index.html"
VERSION_PLACEHOLDER = b"{version}"
CLIENT_MODULE = ("client.js", "client.d.ts")
"""Files for pages of others, with an address that stays."""
_IMMUTABLE = "public, max-age=31536000, immutable"


class PageAssets:
    """The files of the page by their path, as sent: plain and gzip."""

    def __init__(self, folder: Traversable) -> None:
        files = dict(_read_files(folder))
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(f"{path}\0{len(files[path])}\0".encode() + files[path])
        self.version = digest.hexdigest()[:16]
        files[INDEX] = files[INDEX].replace(VERSION_PLACEHOLDER, self.version.encode())
        self._files = files
        self._compressed = {path: gzip.compress(body, mtime=0) for path, body in files.items()}

    @property
    def compressed_bytes(self) -> int:
        """What a browser receives for all files."""
        return sum(map(len, self._compressed.values()))

    def respond(self, path: str, accept_encoding: str, headers: dict[str, str]) -> Response | None:
        """Return the file, compressed if that is accepted; ``None`` for a path that the page does not have."""
        if path not in self._files:
            return None
        compressed = accepts_gzip(accept_encoding.encode("latin-1"))
        body = self._compressed[path] if compressed else self._files[path]
        encoding = {"Content-Encoding": "gzip"} if compressed else {}
        varied = {**headers, **encoding, "Vary": "Accept-Encoding"}
        return Response(body, media_type=MEDIA_TYPES[PurePosixPath(path).suffix], headers=varied)

    def routes(self) -> list[Route]:
        """Return the routes of the page and of its files."""

        def revalidated(request: Request, path: str, policies: dict[str, str]) -> Response:
            headers = {**policies, "Cache-Control": "no-cache", "ETag": f'W/"{self.version}"'}
            response = self.respond(path, request.headers.get("accept-encoding", ""), headers)
            assert response is not None
            if_none_match = request.headers.get("if-none-match", "")
            if apply_etag(response, if_none_match.encode("latin-1")).status_code == 304:
                # With the policies: a browser replaces the headers that it stored by those of the 304.
                return Response(status_code=304, headers=headers)
            return response

        async def index(request: Request) -> Response:
            policies = {"Content-Security-Policy": CSP, "Cross-Origin-Opener-Policy": "same-origin"}
            return revalidated(request, INDEX, policies)

        async def module(request: Request) -> Response:
            return revalidated(request, request.url.path[1:], {})

        async def asset(request: Request) -> Response:
            # Another version's file is refused: a page of two versions would be worse than one that is loaded again.
            known = request.path_params["version"] == self.version
            headers = {"Cache-Control": _IMMUTABLE}
            response = self.respond(request.path_params["path"], request.headers.get("accept-encoding", ""), headers)
            if not known or response is None:
                missing = OctoError("The page has no such file; load it again.", code="not_found")
                return problem_response(missing, request.headers.get("x-request-id", ""))
            return response

        return [
            Route("/", index, methods=["GET"]),
            *(Route(f"/{path}", module, methods=["GET"]) for path in CLIENT_MODULE),
            Route("/assets/{version}/{path:path}", asset, methods=["GET"]),
        ]


def load_page() -> PageAssets:
    """Read the page from the package."""
    return PageAssets(resources.files("octollm.services.reflex").joinpath("page"))


def _read_files(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _read_files(entry, f"{prefix}{entry.name}/")
        elif PurePosixPath(entry.name).suffix in MEDIA_TYPES:
            found.append((prefix + entry.name, entry.read_bytes()))
    return found
