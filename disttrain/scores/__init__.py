"""Scores of predictions, each as its data set's official script counts it (numpy; no torch)."""
