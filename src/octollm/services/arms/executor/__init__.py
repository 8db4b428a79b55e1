"""The executor arm: strangers' programs and queries, run where they can reach nothing.

Here live the sandboxes, the runs of Python and of SQL in them, and the service that offers them. What decides
whether a result is good belongs to the judge, and no program is ever run as a bare subprocess.
"""
