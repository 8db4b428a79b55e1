"""`octollm migrate`: the schemas of OCTOLLM_DATABASE_URL brought to this version."""

from __future__ import annotations

import msgspec
from rich.text import Text

from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.clock import SystemClock
from octollm.storage.migrations import migrate_all


def migrate_command(*, as_json: bool) -> int:
    """Migrate every service's schema, and say what was done with each."""

    async def work() -> int:
        done = await migrate_all(command_settings(), SystemClock())
        if as_json:
            print(msgspec.json.encode({"schemas": done}).decode())
            return EXIT_DONE
        for schema in done:
            changed = (
                f"{schema.before or 'nothing'} → {schema.after}" if schema.before != schema.after else schema.after
            )
            output().print(Text.assemble((schema.service, "octo.title"), f"  {changed}"))
        return EXIT_DONE

    return run_command(work)
