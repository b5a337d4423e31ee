"""What pruning and quantisation make of one small GPT: bytes, parameters, seconds of a forward pass, held-out perplexity.

python benchmarks/smaller.py [--steps 250] [--more 50] [--repeats 30] [--threads 1] [--folder DIR] [KEY=VALUE ...]

Trains smaller.yaml, makes every kind of smaller model of it, trains on where that belongs to the method, as long as a
control that stays whole, and lets `disttrain measure` time all of them in turn. With --folder what is there already is
not made again. Writes smaller_<hardware>_<yyyymm>.{json,md}.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import report

from disttrain import cli, run  # noqa: F401  before the forks and not by each of them
from disttrain.engines import native  # noqa: F401
from disttrain.model_compression import measuring  # noqa: F401

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Make, measure, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="of the model that is made smaller")
    parser.add_argument("--more", type=int, default=50, help="steps of training on")
    parser.add_argument("--repeats", type=int, default=30, help="rounds of the timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where models are kept; a temporary folder if not given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    typed = shlex.join(sys.argv[1:] if arguments is None else arguments)
    about = report.describe("cpu", options.threads, f"python benchmarks/smaller.py {typed}")
    out = options.out or HERE / report.file_name(about).replace("throughput_", "smaller_")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        names = make(folder, options)
        do(folder, "measure", *names, "--out", "table", "--repeats", str(options.repeats),
                  "--threads", str(options.threads))  # fmt: skip
        table = json.loads((folder / "table.json").read_text())
        text = (folder / "table.md").read_text()
    out.with_suffix(".json").write_text(json.dumps({"about": about, "table": table}, indent=1) + "\n")
    facts = "".join(f"- {key}: {value}\n" for key, value in about.items())
    out.with_suffix(".md").write_text(f"# Smaller models\n\n{facts}\n{text}")
    print(out.with_suffix(".md"))


def make(folder: Path, options: argparse.Namespace) -> list[str]:
    """All models, by their names in the folder."""
    train(folder, "whole", str(HERE / "smaller.yaml"), f"train.steps={options.steps}", *options.overrides)
    on = [f"train.steps={options.more}", "optim.warmup_steps=5", "optim.lr=1e-3"]
    begin, half = ["checkpoint.weights=whole", *on], options.more // 2
    train(folder, "whole-on", "whole/config.yaml", *begin)
    cut = {"half": ["--heads", "3", "--ffn-hidden-size", "384", "--importance", "taylor"], "half-layers": ["--layers", "2"],
           "zero80": ["--sparsity", "0.8"]}  # fmt: skip
    for name, words in cut.items():
        made(folder, name, "prune", "whole", "--out", name, *words)
        train(folder, f"{name}-on", f"{name}/config.yaml", *on)
    train(folder, "zero80-gradual", "whole/config.yaml", *begin, "pruning.method=magnitude", "pruning.sparsity=0.8",
          f"pruning.end_step={half}", f"pruning.every={max(1, half // 10)}")  # fmt: skip
    train(folder, "rounded-on", "whole/config.yaml", *begin, "quantization.aware=true")
    forms = {
        "fp16": ("whole", "fp16"),
        "bf16": ("whole", "bf16"),
        "int8-dynamic": ("whole", "int8-dynamic"),
        "int8-static": ("whole", "int8-static"),
        "rounded-on-int8": ("rounded-on", "int8-dynamic"),
        "kmeans5": ("whole", "kmeans"),
        "kmeans3": ("whole", "kmeans", "--bits", "3"),
        "kmeans3-trained": ("whole", "kmeans", "--bits", "3", "--finetune-batches", "20"),
        "zero80-gradual-kmeans5": ("zero80-gradual", "kmeans"),
        "half-on-int8": ("half-on", "int8-dynamic"),
    }
    for name, (source, method, *words) in forms.items():
        made(folder, name, "quantize", source, "--out", name, "--method", method, *words)
    trained = [n for name in cut for n in (name, f"{name}-on")]
    return ["whole", "whole-on", *trained, "zero80-gradual", *forms]


def train(folder: Path, name: str, config: str, *words: str) -> None:
    """A run of this name."""
    if not (folder / name / "summary.json").exists():
        do(folder, "train", config, "run.dir=.", f"run.name={name}", *words)


def made(folder: Path, name: str, *words: str) -> None:
    """A folder of this name, by another command."""
    if not (folder / name).exists():
        do(folder, *words)


def do(folder: Path, *words: str) -> None:
    """A command, in a fork of this process, which has imported all that takes long; held to its exit code."""
    print(shlex.join(["disttrain", *words]), file=sys.stderr, flush=True)
    process = get_context("fork").Process(target=command, args=(folder, words))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"disttrain {shlex.join(words)} ended with {process.exitcode}")


def command(folder: Path, words: Sequence[str]) -> None:
    """What `disttrain` does with these words in that folder; nothing but failures is shown."""
    os.chdir(folder)
    sys.argv = ["disttrain", *words]
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        cli.main()


if __name__ == "__main__":
    main()
