"""The orchestrator: tasks, files, budgets, the event log, the arms, and who may do what.

It alone has the log and the root key. It runs tasks by calling the arms; it knows nothing of models or prompts.
"""
