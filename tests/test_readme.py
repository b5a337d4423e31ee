"""The README's commands do what it says, and every config in configs/ is a good one."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain import layout
from disttrain.config.load import load
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT / "configs/wandb_sweep.yaml"
"""A search over settings, in W&B's language: tests/runs/test_wandb.py."""
STRATEGIES = set((ROOT / "configs/sweeps").iterdir())
"""Strategies to compare: tests/unit/compare/test_plan.py."""
OTHERS = {*(ROOT / "configs/vectors").iterdir(), ROOT / "configs/papers/ngram_wikitext2.yaml"}
"""Word vectors and n-grams: tests/unit/vectors, tests/unit/ngrams."""
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - {SWEEP} - STRATEGIES - OTHERS)

SMALL = ["train.steps=3", "optim.warmup_steps=1", "train.eval_sequences=8", "data.max_bytes=300000", "model.layers=4",
         "data.cache_dir=cache", "train.global_batch_size=8", "model.preset=null", "model.hidden_size=32",
         "model.heads=2"]  # fmt: skip
"""Makes the commands quick; all else is as in the README."""


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.timeout(900)
def test_every_command_of_the_readme(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment, ran = {**os.environ, "OMP_NUM_THREADS": "1"}, 0
    for line in commands():
        words = shlex.split(line, comments=True)
        if words[0] == "make":  # make test runs this very test; make demo is tested as disttrain demo
            subprocess.run([*words[:1], "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            continue
        takes_settings = words[1] != "checkpoint" and {"train", "check", "prepare", "verify"} & set(words)
        small = [*SMALL, "data.tokenizer_vocab_size=400"] if "configs/bert_tiny.yaml" in words else SMALL
        words += small if takes_settings else []
        if words[0] == "disttrain":
            done = warm.run(words[1:], tmp_path, environment, timeout_s=200)
        else:
            assert words[0] == "torchrun"
            torchrun = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            done = subprocess.run(
                torchrun, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200, env=environment
            )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 10


def test_the_readme_names_the_files_it_speaks_of() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_all_configs_are_found() -> None:
    assert len(CONFIGS) >= 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_have_no_problems(path: Path) -> None:
    """On every usual number of ranks that the layout's axes divide; data aside, which the user brings."""
    config = load(path)
    parallel = config.parallel
    copies = parallel.tensor * parallel.pipeline * parallel.context * parallel.replicate
    worlds = [world_size for world_size in (1, 2, 4, 8) if world_size % copies == 0]
    assert 8 in worlds
    for world_size in worlds:
        assert layout.problems(config, world_size) == []
