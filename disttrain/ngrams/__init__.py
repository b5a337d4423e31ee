"""Interpolated modified Kneser-Ney n-gram models of text files: the `KneserNey` of disttrain.models.ngram as a command."""
