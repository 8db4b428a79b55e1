"""Logs, metrics and spans: what a service tells about its own work.

Every instrument is declared in ``metrics.py``; secrets are masked in ``masking.py``.
Nothing here decides where logs and spans go: the process that hosts the services does.
"""

from octollm.telemetry.logs import AccessLog, Logger, configure_logging, get_logger
from octollm.telemetry.masking import mask
from octollm.telemetry.metrics import Metrics
from octollm.telemetry.spans import ExportBuffer, Span, Tracer

__all__ = [
    "AccessLog",
    "ExportBuffer",
    "Logger",
    "Metrics",
    "Span",
    "Tracer",
    "configure_logging",
    "get_logger",
    "mask",
]
