"""Why a run hangs: which ranks did not arrive, in which group, at which line (docs/faults.md, docs/decisions/0009).

`observer` runs in every rank and writes what it sees to the run folder, `explanation` makes one paragraph of the files.
"""
