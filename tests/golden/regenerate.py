"""Golden loss curves: `make golden` writes them anew after a deliberate change of the arithmetic; review the diff."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.data import open_data, prepare
from disttrain.engines.native import NativeEngine
from disttrain.mesh import Mesh
from disttrain.optim import learning_rate
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from tests.ranks import run_ranks

FOLDER = Path(__file__).parent
STEPS = 30
CURVES: dict[str, dict] = {
    "gpt_fp64": {"precision": "fp64"},
    "gpt_fp32": {"precision": "fp32", "model.dropout": 0.1, "train.label_smoothing": 0.1},
    "bert_fp32": {"precision": "fp32", "model.family": "bert", "train.micro_batch_size": 4},
}
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def curve(name: str) -> list[float]:
    """Losses of a small run on one process; the corpus is made here."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(" ".join(WORDS[(i * j + j) % 10] for j in range(1, 12)) + "." for i in range(400)))
        config = Config.model_validate({
            "run": {"seed": 7},
            "model": {"layers": 2, "hidden_size": 32, "heads": 4, "max_positions": 64, "ffn_hidden_size": 128,
                      "layer_norm_epsilon": 1e-5, "vocab_size": 261},
            "data": {"corpus": "text", "path": str(text), "tokenizer": "bytes", "sequence_length": 64,
                     "document": "line", "cache_dir": folder, "workers": 1},
            "train": {"steps": STEPS, "global_batch_size": 8},
            "optim": {"lr": 3e-3, "warmup_steps": 5},
        })  # fmt: skip
        (losses,) = run_ranks(_train, 1, with_values(config, CURVES[name]))
    return losses


def _train(rank: int, config: Config) -> list[float]:
    data = open_data(config, prepare(config))
    groups = make_groups(Mesh(), rank, "cpu", Traffic())
    engine = NativeEngine(config, groups, torch.device("cpu"), config.precision)  # type: ignore[arg-type]
    losses = []
    for step in range(1, STEPS + 1):
        result = engine.step(list(data.micro_batches(step - 1, 0, 1)), step, learning_rate(config.optim, step, STEPS))
        losses.append(sum(float(loss.sum) / int(loss.count) for loss in result.losses.values()))
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in CURVES:
        lines = [f"{step} {loss!r}" for step, loss in enumerate(curve(name), start=1)]
        (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")
        print(f"{name}: {lines[0]} ... {lines[-1]}")
