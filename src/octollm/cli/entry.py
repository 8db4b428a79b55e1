"""The process's entry point: runs the command line and exits with its code."""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Run the command line and exit the process with its exit code."""
    # Modules and classes are never freed. With Python's threshold of 700 new objects, a tenth of the time of importing
    # goes into looking at them again and again.
    gc.set_threshold(10_000, 20, 20)
    try:
        # Imported inside the try, so that Ctrl-C during the import ends the process cleanly.
        from octollm.cli.app import app  # noqa: PLC0415

        app(prog_name="octollm")
    except KeyboardInterrupt:
        from octollm.cli.runtime import EXIT_INTERRUPTED  # noqa: PLC0415  imports the client

        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        from octollm.cli.runtime import EXIT_FAILED  # noqa: PLC0415  imports the client

        # The reader of our output closed the pipe (`octollm events tail | head`). Point stdout elsewhere, so that the
        # flush at exit does not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
