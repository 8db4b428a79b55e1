"""The services: each a composition root, its HTTP operations, and what it alone knows.

A service is built from the layers below and opened by its ``<name>_service`` function. It imports no other service:
they speak over HTTP, in one process or in many.
"""
