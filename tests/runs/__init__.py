"""Tests of whole runs through the real command line."""
