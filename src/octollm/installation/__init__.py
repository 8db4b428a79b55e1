"""The services of an installation put together: all in one process, or one in a process of its own.

It knows the services' composition roots and gives each its keys, its socket and its store. Nothing here decides
what a service does, and nothing here prints. Import single modules: ``services`` and ``embedded`` import every service,
while clients of a running installation need ``home`` alone.
"""
