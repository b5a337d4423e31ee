"""Smaller models from trained ones: pruning, quantisation, and what they cost and save (docs/smaller.md)."""
