"""The page: one file with everything in it, served under a policy that lets it run nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_INLINE_ELEMENT = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL)


def build_csp(html: str) -> str:
    """Return a Content-Security-Policy (CSP level 3) that allows the inline scripts and styles of ``html`` only."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE_ELEMENT.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    nothing = "'none'"
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src {' '.join(hashes['script']) or nothing}",
            f"style-src {' '.join(hashes['style']) or nothing}",
            "img-src 'self' data:",
            "connect-src 'self'",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def build_page_route() -> Route:
    """Return the route of the page. The file is read once, here."""
    html = resources.files("octollm.services.reflex").joinpath("page", "index.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": build_csp(html),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    body = html.encode()

    async def page(_request: Request) -> Response:
        return Response(body, media_type="text/html; charset=utf-8", headers=headers)

    return Route("/", page, methods=["GET"])
