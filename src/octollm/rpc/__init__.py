"""One service calling another: the server kit, the client, discovery, idempotency, health.

It knows operations, headers, tokens and problems; it does not know tasks, plans or models.
Policies are decided in ``octollm.resilience``; here is the I/O around them.
"""
