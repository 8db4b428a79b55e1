"""Numbers as they travel: within what every JSON reader and every database keeps exactly."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_JSON_INTEGER = 2**53 - 1
"""RFC 8259 section 6: beyond it readers need not agree on an integer."""
Count = Annotated[int, Meta(ge=0, le=MAX_JSON_INTEGER)]
