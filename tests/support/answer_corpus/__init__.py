"""A corpus of files as people have them, each with what a person reads in it, and questions with known answers.

Every file is made from a seed, and every answer is computed from the values that went into it, never by the code that
is measured. ``corpus.py`` puts it together and guards it: its digest is frozen in ``frozen.json``.
"""
