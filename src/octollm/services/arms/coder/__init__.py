"""The coder arm: writes code with passing tests, answers questions over tables with SQL, and writes texts.

The logic is plain functions over callables; ``service.py`` binds them to HTTP. This package imports no other arm, and
never runs what a model wrote: only the executor does.
"""
