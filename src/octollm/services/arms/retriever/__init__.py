"""The retriever: passages for a question, and answers with the lines that carry them.

Its thinking lives here as plain functions over callables, and the HTTP service that binds them. No other arm's code
may be imported, and documents themselves are kept by the memory service.
"""
