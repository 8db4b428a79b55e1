"""The monitor: health of every service by probes and events, and the spans of every task.

It keeps a bounded health history in memory and a bounded number of spans in SQL, and changes nothing elsewhere.
"""
