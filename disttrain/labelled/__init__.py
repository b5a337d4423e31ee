"""Labelled examples: readers of the official files, cleaning, vocabularies, subwords, splits (numpy; no torch)."""
