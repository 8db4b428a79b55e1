"""One process, no servers: every service of an installation composed, bound to this machine, and served.

It knows the services' composition roots and gives each its keys, its socket and its store. Nothing here decides
what a service does, and nothing here prints. Import the one module that is wanted: clients of a running
installation need ``home`` alone.
"""
