"""Exit codes, and which failure has which."""

from __future__ import annotations

from octollm.contracts.problems import ERROR_KINDS
from octollm.errors import OctoError

EXIT_DONE = 0
"""What was asked for is done; for a goal: it completed."""
EXIT_FAILED = 1
"""It failed, and the reason was said."""
EXIT_USAGE = 2
"""Wrong usage or input: nothing was sent or started."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C or a signal (128 + SIGINT)."""


def exit_code_for(error: OctoError) -> int:
    """Return the exit code for a failure: faults of input, settings and declarations are the user's to mend."""
    kind = ERROR_KINDS.get(error.code)
    if error.code in ("setting_invalid", "arm_invalid") or (kind is not None and kind.status in (400, 413)):
        return EXIT_USAGE
    return EXIT_FAILED
