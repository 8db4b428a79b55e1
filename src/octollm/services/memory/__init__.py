"""The memory of a tenant: documents in searchable passages, and facts by name.

It has a database of its own that no other service opens, and sees one tenant at a time. What a passage means, and
which one answers a question, belongs to the retriever.
"""
