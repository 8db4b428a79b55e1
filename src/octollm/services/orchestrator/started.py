"""The first row of a start in the audit log: version, settings without secrets, and whose keys are believed."""

from __future__ import annotations

from collections.abc import Mapping

from octollm import __version__
from octollm.capability import DirectoryEntry, Principal
from octollm.clock import Clock
from octollm.config import SETTING_SPECS, Settings
from octollm.services.orchestrator.audit import SYSTEM_TENANT, Actor, record_audit
from octollm.storage import Database
from octollm.telemetry.masking import MASK, mask_text


async def record_startup(
    db: Database, settings: Settings, directory: Mapping[str, DirectoryEntry], roots: list[str], clock: Clock
) -> None:
    """Write that this process starts, with what, and which keys it begins with."""
    detail = {
        "version": __version__,
        "settings": redact_settings(settings),
        "roots": roots,
        "keys": {name: list(entry.jkts) for name, entry in directory.items()},
    }
    actor = Actor(Principal("orchestrator", "orchestrator", SYSTEM_TENANT), service="orchestrator")
    async with db.transaction() as tx:
        await record_audit(tx, actor, "system.started", "orchestrator", clock.now(), detail)


def redact_settings(settings: Settings) -> dict[str, str]:
    """Return every setting by its variable; of a secret only whether it is set."""
    told: dict[str, str] = {}
    for name, spec in SETTING_SPECS.items():
        value = getattr(settings, name, None)
        if value is None or value in ("", ()):
            continue
        told[f"OCTOLLM_{spec.name}"] = MASK if spec.secret else mask_text(str(value))
    return told
