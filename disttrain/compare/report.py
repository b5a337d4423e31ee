"""Writes every form of a comparison's report into a folder, from run folders alone. Imports no torch."""

from collections.abc import Callable
from pathlib import Path

from disttrain.compare.comparison import Comparison
from disttrain.compare.files import markdown, runs_csv, strategies_csv
from disttrain.compare.page import html
from disttrain.compare.picture import draw
from disttrain.folders import write_atomically

TEXTS: dict[str, Callable[[Comparison], str]] = {
    "report.html": html,
    "report.md": markdown,
    "strategies.csv": strategies_csv,
    "runs.csv": runs_csv,
}
"""Files of text, and what writes them."""
PICTURE = "report.png"
FILES = (*TEXTS, PICTURE)


def write(comparison: Comparison, folder: Path) -> None:
    """Write all files; the same records give the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, render in TEXTS.items():
        write_atomically(folder / name, render(comparison))
    draw(comparison, folder / PICTURE)
