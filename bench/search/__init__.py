"""Search of the memory: quality in nine languages, and times over many passages."""
