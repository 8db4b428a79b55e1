"""The planner arm: turns a goal into a plan of steps, or reaches it with a few generated programs.

The logic is plain functions over callables; ``service.py`` binds them to HTTP. This package imports no other arm, and
never runs code or reads a file itself.
"""
