"""The planner: a goal becomes a plan of steps, or is worked off with a few programs.

Its thinking lives here as plain functions over callables, and the HTTP service that binds them. No other arm's code
may be imported, and nothing here runs code or reads a file by itself.
"""
