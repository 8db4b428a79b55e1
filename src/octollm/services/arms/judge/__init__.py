"""The judge says whether code is valid, and whether a step's result is what was asked.

Its checks live here as plain functions over callables, and the HTTP service that binds them. No other arm's code may
be imported, and the code under judgement is never run here, only by the executor.
"""
