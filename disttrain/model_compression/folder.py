"""Folders of smaller models: a pruned one is a run of step 0, a quantised one has weights of another form.

A quantised folder holds `config.yaml` (the run's), `weights.safetensors` (what the method made of the tensors) and
`quantized.json` (method, settings, what belongs to each tensor, size and CRC-32 of the weights). Nothing in it is a pickle.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from disttrain import checkpoint, checkpoint_contents, data
from disttrain.config.load import dump, load, with_values
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import CheckpointConfig, Config
from disttrain.config.smaller import PruningConfig, QuantizationConfig
from disttrain.model_compression import deep, int8
from disttrain.model_compression.magnitude import zeros
from disttrain.model_compression.method import Method
from disttrain.models import Model, build_model
from disttrain.tasks.trained import Trained, load_trained

WEIGHTS, DESCRIPTION = "weights.safetensors", "quantized.json"
FORMAT = 1
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What run.name can be."""
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Opened:
    """A model of a run or of a quantised folder, and what it takes on disk."""

    trained: Trained
    method: str
    """What was done to it: none for a run."""
    nbytes: int
    """Of the weights of a run's checkpoint, without the optimizer; of both files of a quantised folder."""
    parameters: int
    """Tied ones once."""
    zeros: float
    """Share of the elements of all matrices that are exactly zero; of an int8 model, that have become zero."""


def weights_of(trained: Trained) -> dict[str, Tensor]:
    """Every parameter by name; tied ones once."""
    return {name: p.detach() for name, p in trained.model.state_dict().items() if name not in trained.model.tied}


def write_run(out: Path, config: Config, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A run of step 0 with these weights, which `train`, `sample`, `export` and all commands here take; and pruned.json.

    Its config begins a new run with its weights, under another run.name. The folder appears when all is written.
    """
    config = with_values(config, {
        "run.name": out.name if re.fullmatch(NAME, out.name) else "pruned",
        "checkpoint": CheckpointConfig(weights=str(out)),
        "pruning": PruningConfig(method="keep") if about.get("sparsity") else PruningConfig(),
        "quantization": QuantizationConfig(),
    })  # fmt: skip
    with checkpoint_contents.appearing(out) as writing:
        folder = checkpoint.path_of(writing / "checkpoints", 0)
        folder.mkdir(parents=True)
        named = ((f"model.{name}", value) for name, value in weights.items())
        for number, tensors in enumerate(checkpoint_contents.in_files(named), start=1):
            checkpoint_contents.write(tensors, folder / f"shard-00001-model-{number:05d}.safetensors")
        checkpoint.describe(folder, {"step": 0}, [checkpoint.checksums_of(folder, "shard-")])
        (writing / "config.yaml").write_text(dump(config))
        (writing / "pruned.json").write_text(json.dumps(about, indent=1))


def write_quantized(
    out: Path, trained: Trained, method: Method, tensors: dict[str, Tensor], about: Mapping[str, Any]
) -> None:
    """A quantised folder, which appears when all is written. `about` is what reading needs beside the tensors."""
    with checkpoint_contents.appearing(out) as writing:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, writing / WEIGHTS)
        files = checkpoint.checksums_of(writing, WEIGHTS)
        head = {"format": FORMAT, "method": method, "step": trained.step, "files": files}
        (writing / DESCRIPTION).write_text(json.dumps({**head, **about}, indent=1))
        (writing / "config.yaml").write_text(dump(trained.config))


def open_folder(folder: Path) -> Opened:
    """The model of a run, or of a quantised folder. Raises RefusedInput for what is neither, or damaged."""
    if not (folder / DESCRIPTION).is_file():
        trained = load_trained(folder)
        path, _ = checkpoint.newest_good(folder / "checkpoints")
        held = checkpoint_contents.entries(path) if path is not None else {}
        nbytes = sum(entry.nbytes for entry in held.values() if entry.section == "model")
        return Opened(trained, "none", nbytes, *_contents(weights_of(trained)))
    try:
        about, tensors = _read(folder)
        config = load(folder / "config.yaml")
        model, weights = _model(config, about, tensors)
        step = int(about["step"])
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, RuntimeError, RecursionError) as error:
        if isinstance(error, RefusedInput):
            raise
        message = f"it cannot be read: {type(error).__name__}: {error}"
        raise RefusedInput(
            [Problem((f"folder {folder}",), message, "write it again with `disttrain quantize`")]
        ) from error
    prepared = data.prepare(config)
    trained = Trained(config, model, data.load_tokenizer(prepared.tokenizer), prepared, step)
    nbytes = sum((folder / name).stat().st_size for name in (WEIGHTS, DESCRIPTION))
    return Opened(trained, about["method"], nbytes, *_contents(weights))


def _contents(weights: Mapping[str, Tensor]) -> tuple[int, float]:
    return sum(value.numel() for value in weights.values()), zeros(weights)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Raises ValueError where the files do not belong together."""
    about = json.loads((folder / DESCRIPTION).read_text())
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{DESCRIPTION} is not of format {FORMAT}")
    if about.get("method") not in get_args(Method):
        raise ValueError(f"there is no method {about.get('method')!r}")
    if about.get("files") != checkpoint.checksums_of(folder, WEIGHTS):
        raise ValueError(f"{WEIGHTS} has another size or checksum than when it was written")
    return about, load_file(folder / WEIGHTS)


def _model(config: Config, about: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[Model, dict[str, Tensor]]:
    """The model, and its tensors under its parameters' names."""
    method: Method = about["method"]
    if method in ("int8-dynamic", "int8-static"):
        bounds = {name: int8.Bounds(*pair) for name, pair in about["bounds"].items()}
        weights = {name: value for name, value in tensors.items() if not name.endswith(int8.SCALE)}
        return int8.int8_model(config.model, tensors, bounds), weights
    if method == "kmeans":
        shared = {name: deep.read(name, tensors, entry).values for name, entry in about["matrices"].items()}
        tensors = {name: shared[name] if name in shared else tensors[name] for name in about["order"]}
    model = build_model(config.model, config.run.seed, HALF.get(method, torch.float32))
    expected = {name for name in model.state_dict() if name not in model.tied}
    if tensors.keys() != expected:
        raise ValueError(f"its tensors are not those of the model: {sorted(tensors.keys() ^ expected)[:3]}")
    model.load_state_dict(tensors, strict=False)
    return model.eval(), tensors


def refuse_used(out: Path) -> list[Problem]:
    """Why nothing can be written there; [] if it can."""
    if not out.exists():
        return []
    return [Problem((f"--out {out}",), "it is there already", "name a folder that is not there")]
