"""A folder with a config, and sweeps over it whose runs are made up."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from disttrain.compare import plan
from disttrain.compare.plan import Plan
from disttrain.compare.schema import load_sweep

PROGRAM = str(Path(__file__).with_name("made_up.py"))


class Place:
    """Where a comparison is made."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "corpus").mkdir()
        (folder / "corpus" / "text.txt").write_text("some text\n" * 400)
        config = {"model": {"layers": 4, "hidden_size": 32, "heads": 4, "max_positions": 32},
                  "data": {"corpus": "text", "path": "corpus", "sequence_length": 32, "cache_dir": "cache"},
                  "train": {"steps": 4, "global_batch_size": 8}}  # fmt: skip
        (folder / "base.yaml").write_text(yaml.safe_dump(config))

    def sweep(self, strategies: dict[str, Any], **more: Any) -> Path:
        """Write a sweep whose launcher makes runs up."""
        tree = {"config": "base.yaml", "nproc": 2, "repeats": 2, "launcher": ["{python}", PROGRAM, "{nproc}"]}
        path = self.folder / "sweep.yaml"
        path.write_text(yaml.safe_dump({**tree, "strategies": strategies, **more}, sort_keys=False))
        return path

    def plan(self, strategies: dict[str, Any], overrides: tuple[str, ...] = (), **more: Any) -> Plan:
        """The plan of such a sweep."""
        path = self.sweep(strategies, **more)
        made = plan.make(load_sweep(path), path, self.folder / "out", overrides)
        made.folder.mkdir(exist_ok=True)
        return made


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)
