"""The executor arm: runs untrusted programs and queries in a sandbox.

This package has the sandboxes, the jobs for Python and SQL, and the service. Whether a result is good is the judge's
decision. No program is ever run as a bare subprocess.
"""
