"""Revisions of the monitor's schema."""
