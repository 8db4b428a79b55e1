"""Watching the services: who answers, since when, what events say of them; and the spans of their work, by task.

It keeps a bounded history of health in memory and a bounded number of spans in SQL, and changes nothing elsewhere.
"""
