"""Logs, metrics and traces of a service.

Every metric is declared in ``metrics.py``; secrets are masked by ``octollm.masking``. The process that hosts the
services decides where logs and spans go.
"""

from octollm.masking import mask
from octollm.telemetry.logs import AccessLog, Logger, configure_logging, get_logger
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
