"""Tasks and steps: their states, their store, the worker that runs them, and the ledger of their budgets.

It knows what a task is and how its steps follow each other; it does not know HTTP paths of the public API.
The database is the source of truth: whatever is told elsewhere was committed first.
"""
