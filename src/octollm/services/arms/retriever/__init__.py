"""The retriever arm: finds passages for a question, and answers with citations.

The logic is plain functions over callables; ``service.py`` binds them to HTTP. This package imports no other arm, and
the memory service stores the documents.
"""
