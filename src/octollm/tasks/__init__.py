"""Tasks and steps: their states, their store, the worker that runs them, and the ledger of their budgets.

This package knows what a task is and in which order its steps run; it does not know HTTP paths of the public API.
The database is the source of truth: whatever is published elsewhere was committed first.
"""
