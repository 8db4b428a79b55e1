"""Plain text processing without I/O: tokenizing, stemming, BM25, passages, goal classification.

What travels between services belongs to ``contracts``; what asks a model belongs to the arms.
"""
