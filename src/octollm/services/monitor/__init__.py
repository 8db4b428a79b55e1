"""Watching the services: who answers, since when, and what events say of them.

It keeps a bounded history in memory and changes nothing. Traces are not received here yet.
"""
