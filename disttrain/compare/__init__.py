"""Which of several strategies trains best here: `disttrain compare` runs them and reports (docs/compare.md)."""
