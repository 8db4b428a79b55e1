"""The built-in arms: planner, executor, coder, judge, retriever, and the few adapters that they share.

How an arm thinks stands in its own folder as plain functions over what it is handed; its ``service.py`` hands it the
model, the files and the other arms over HTTP. No arm imports another.
"""
