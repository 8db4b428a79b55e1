"""The document reader reads untrusted files: their bytes become text with locations, and raw tables.

Nothing here opens a file, a socket or a process. Parsers of binary formats are given untrusted bytes, so a service runs
them in its sandbox; text in any encoding, HTML and source code are safe to read in process.
"""
