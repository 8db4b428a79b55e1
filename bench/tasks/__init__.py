"""The throughput of tasks beside DBOS: ``make bench-tasks``."""
