"""Plain text processing without I/O: tokenizing, stemming, BM25, passages, goal classification.

Types that services exchange belong to ``contracts``; prompts for a model belong to the arms.
"""
