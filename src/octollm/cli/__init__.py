"""The command line: what a person types, and what is printed.

It talks to the public door like any other client, and starts an installation in its own process for ``up`` and
``demo``. Nothing below it prints, reads the environment or ends the process.
"""

from octollm.cli.entry import main

__all__ = ["main"]
