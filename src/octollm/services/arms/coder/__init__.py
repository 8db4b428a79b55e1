"""The coder: code with tests that pass, answers from tables by SQL, and texts.

Its thinking lives here as plain functions over callables, and the HTTP service that binds them. No other arm's code
may be imported, and what a model wrote is never run here, only by the executor.
"""
