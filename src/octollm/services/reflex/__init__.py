"""The API gateway: authentication, rate limits, the input guardrail, forwarding, live updates and the web page.

It stores nothing, decides nothing about tasks, and holds no authority of its own over them.
"""

from octollm.services.reflex.service import reflex_service

__all__ = ["reflex_service"]
