"""Revisions of the memory's schema."""
