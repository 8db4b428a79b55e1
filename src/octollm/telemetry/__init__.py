"""Logs and metrics: what a service tells about its own work.

Every instrument is declared in ``metrics.py``; secrets are masked in ``masking.py``.
Nothing here decides where logs go: the process that hosts the services does.
"""

from octollm.telemetry.logs import Log, configure_logs, log_for
from octollm.telemetry.masking import mask
from octollm.telemetry.metrics import Metrics

__all__ = ["Log", "Metrics", "configure_logs", "log_for", "mask"]
