"""What travels on the wire: tasks, plans, results, events, frames, problems.

Only msgspec Structs and pure functions over them live here. No I/O, and nothing that knows who sends what.
"""
