"""The command line: commands, their options, and what they print.

It talks to the gateway like any other client; ``up`` and ``demo`` start an installation in their own process. Only
this package prints, reads the environment of the process and exits. One module holds one noun (``tasks``, ``keys``).
"""

from octollm.cli.entry import main

__all__ = ["main"]
