"""Settings of a run: schema, presets, loading and cross-checks. Imports no torch."""
