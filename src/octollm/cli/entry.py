"""Where the process begins and ends: arguments in, exit code out."""

from __future__ import annotations

import os
import sys

from octollm.cli.runtime import EXIT_FAILED, EXIT_INTERRUPTED


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        # Imported here, so that Ctrl-C in the first tenths of a second is answered like any other.
        from octollm.cli.app import app  # noqa: PLC0415

        app(prog_name="octollm")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has enough of it (`octollm events tail | head`); nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
