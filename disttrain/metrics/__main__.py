"""Prints the tables of docs/measurement.md."""

from disttrain.metrics import markdown_tables

print(markdown_tables(), end="")
