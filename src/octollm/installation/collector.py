"""Python's garbage collector in a process that serves."""

from __future__ import annotations

import gc

GC_THRESHOLD = 10_000
"""Objects that are made, beyond those that are gone, before the collector looks at the new ones; Python has 700."""


def tune_garbage_collector() -> None:
    """Tell the collector that what a started process consists of stays.

    Modules, classes and caches are some hundred thousand objects, which a full collection looks at one by one, during a
    call, to find that none of them is gone.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
