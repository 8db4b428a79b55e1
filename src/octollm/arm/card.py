"""An arm's card: what it is and does, in the words of the Agent2Agent protocol (A2A 1.0 section 4.4.1).

An arm speaks plain HTTP and JSON, not one of A2A's own bindings; its binding names the OpenAPI description instead.
https://a2a-protocol.org/latest/specification/
"""

from __future__ import annotations

import msgspec

from octollm import __version__
from octollm.arm.arm import Arm

CARD_PATH = "/.well-known/agent-card.json"
BINDING = "urn:octollm:arm"
"""``protocolBinding`` is an open string; this one says: ``POST <url>/<skill>``, as ``<url>/openapi.json`` tells."""
_JSON_MODES = ("application/json",)


class AgentInterface(msgspec.Struct, frozen=True, rename="camel"):
    """Where an arm answers, and how it is spoken to."""

    url: str
    protocol_binding: str = BINDING
    protocol_version: str = "1.0"


class AgentSkill(msgspec.Struct, frozen=True, rename="camel"):
    """One operation. ``id`` is its name; the scope that opens it is among the tags."""

    id: str
    name: str
    description: str
    tags: tuple[str, ...]
    input_modes: tuple[str, ...] = _JSON_MODES
    output_modes: tuple[str, ...] = (*_JSON_MODES, "application/x-ndjson")


class AgentCapabilities(msgspec.Struct, frozen=True, rename="camel"):
    """``streaming``: every operation also answers line by line while it works."""

    streaming: bool = True
    push_notifications: bool = False


class AgentCard(msgspec.Struct, frozen=True, rename="camel"):
    """``GET /.well-known/agent-card.json``."""

    name: str
    description: str
    version: str
    supported_interfaces: tuple[AgentInterface, ...]
    skills: tuple[AgentSkill, ...]
    security_schemes: dict[str, dict[str, dict[str, str]]]
    security_requirements: tuple[dict[str, dict[str, dict[str, list[str]]]], ...]
    capabilities: AgentCapabilities = AgentCapabilities()
    default_input_modes: tuple[str, ...] = _JSON_MODES
    default_output_modes: tuple[str, ...] = _JSON_MODES


def build_card(arm: Arm, urls: tuple[str, ...]) -> AgentCard:
    """Return the card of ``arm`` as it answers at ``urls``."""
    return AgentCard(
        name=arm.name,
        description=arm.description,
        version=__version__,
        supported_interfaces=tuple(AgentInterface(url) for url in urls),
        skills=tuple(
            AgentSkill(
                declared.name,
                declared.name,
                declared.summary or arm.description,
                (f"{arm.name}:{declared.name}", declared.kind, *arm.accepts),
            )
            for declared in arm.operations
        ),
        security_schemes={"bearer": {"httpAuthSecurityScheme": {"scheme": "Bearer", "bearerFormat": "JWT chain"}}},
        security_requirements=({"schemes": {"bearer": {"list": []}}},),
    )
