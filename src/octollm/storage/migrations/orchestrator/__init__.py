"""Revisions of the orchestrator's schema."""
