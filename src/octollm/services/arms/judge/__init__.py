"""The judge arm: decides whether code is valid, and whether a step's result meets its goal.

The checks are plain functions over callables; ``service.py`` binds them to HTTP. This package imports no other arm, and
never runs the code that it judges: only the executor does.
"""
