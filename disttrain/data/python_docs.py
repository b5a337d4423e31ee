"""The corpus every Python carries: English and code of the standard library, about 13 MB, no network."""

import ast
import importlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "encodings"}
# encodings is mostly tables of code points; topics.py is the dictionary that is read as prose
_SKIPPED_FILES = {"pydoc_data/topics.py"}


def source_files() -> list[Path]:
    """The standard library's own modules, sorted by path: no tests, no installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith(("config-", "."))]
        files += [Path(place, name) for name in names if name.endswith(".py")]
    return sorted(f for f in files if f.relative_to(root).as_posix() not in _SKIPPED_FILES)


def topics() -> list[str]:
    """The language reference as pydoc shows it, or nothing where this Python leaves pydoc_data out."""
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError:
        return []
    return [text for _, text in sorted(module.topics.items())]


def documents() -> Iterator[str]:
    """Prose first: pydoc's topics, then each module's docstrings, then each module's source without them.

    A docstring stands in one place only, so none can be trained on and held out. Files that are not UTF-8 or not this
    Python's syntax are left out. The same Python gives the same corpus.
    """
    yield from topics()
    code = []
    for path in source_files():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        docstrings, rest = _separated(source, tree)
        if docstrings.strip():
            yield docstrings
        if rest.strip():
            code.append(rest)
    yield from code


def _separated(source: str, tree: ast.Module) -> tuple[str, str]:
    """A module's docstrings, one paragraph each, and its source without those lines."""
    texts: list[str] = []
    lines: list[str | None] = list(source.split("\n"))
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        waiting.extend(reversed(node.body))
        text = ast.get_docstring(node)
        if text:
            first, stop = node.body[0], node.body[0].end_lineno or node.body[0].lineno
            if (lines[first.lineno - 1] or "")[: first.col_offset].strip():
                continue  # it shares its line with the definition: it stays in the source
            texts.append(text)
            lines[first.lineno - 1 : stop] = [None] * (stop - first.lineno + 1)
    return "\n\n".join(texts), "\n".join(line for line in lines if line is not None)
