"""Logs, metrics and spans: what a service tells about its own work.

Every instrument is declared in ``metrics.py``; secrets are masked in ``masking.py``.
Nothing here decides where logs and spans go: the process that hosts the services does.
"""

from octollm.telemetry.logs import Log, ServedLog, configure_logs, log_for
from octollm.telemetry.masking import mask
from octollm.telemetry.metrics import Metrics
from octollm.telemetry.spans import Buffer, Span, Tracer

__all__ = ["Buffer", "Log", "Metrics", "ServedLog", "Span", "Tracer", "configure_logs", "log_for", "mask"]
