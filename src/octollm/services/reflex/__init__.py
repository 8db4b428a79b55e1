"""The public door: who may enter, how often, and what they are shown live.

It authenticates, limits, forwards the public API to the orchestrator, and serves WebSocket, SSE and the page.
It stores nothing, decides nothing about tasks, and cannot name a principal itself.
"""

from octollm.services.reflex.service import reflex_service

__all__ = ["reflex_service"]
