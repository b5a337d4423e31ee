"""`disttrain quantize`: weights of fewer bits out of a trained run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.model_compression import deep, int8, kmeans
from disttrain.model_compression.evaluation import training_batches
from disttrain.model_compression.folder import HALF, refuse_used, weights_of, write_quantized
from disttrain.model_compression.method import Method
from disttrain.tasks.trained import Trained, load_trained, trained_checkpoint

CALIBRATION_BATCHES, BITS = 16, 5
"""Where nothing is given. 5 bits are those of the paper's fully connected layers."""


@dataclass(frozen=True)
class Quantization:
    """How to make weights smaller."""

    method: Method
    batches: int | None = None
    """Batches of 16 training sequences that bounds of inputs (int8-static) are taken from."""
    bits: int | None = None
    """2^bits values a matrix (kmeans)."""
    finetune_batches: int | None = None
    """Batches of 16 training sequences that the values are trained on (kmeans); none when not given."""
    finetune_lr: float | None = None
    """Learning rate of that; 1e-4 when not given."""


def quantize(run: Path, out: Path, asked: Quantization) -> None:
    """Write the quantised folder. Raises RefusedInput, everything at once, before anything is written."""
    config, _ = trained_checkpoint(run)
    found = [*_problems(config, asked), *refuse_used(out)]
    if found:
        raise RefusedInput(found)
    trained = load_trained(run)
    tensors, about = quantized(trained, asked)
    write_quantized(out, trained, asked.method, tensors, {"run": str(run), **about})


def quantized(trained: Trained, asked: Quantization) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors for the file, what its JSON says beside) of a trained model."""
    weights = weights_of(trained)
    if asked.method in HALF:
        return {name: value.to(HALF[asked.method]) for name, value in weights.items()}, {}
    if asked.method == "kmeans":
        return _shared(trained, weights, asked)
    bounds: dict[str, int8.Bounds] = {}
    about: dict[str, Any] = {}
    if asked.method == "int8-static":
        about["batches"] = asked.batches or CALIBRATION_BATCHES
        bounds = int8.calibrate(trained.model, training_batches(trained, about["batches"]))
    return int8.quantize(weights), {**about, "bounds": bounds}


def _shared(trained: Trained, weights: Mapping[str, Tensor], asked: Quantization) -> tuple[dict[str, Tensor], dict]:
    bits = asked.bits or BITS
    shared = {
        name: kmeans.cluster(value.numpy().astype(np.float32), 1 << bits, keep_zeros=bool((value == 0).any()))
        for name, value in weights.items()
        if value.ndim > 1
    }
    about: dict[str, Any] = {"bits": bits, "order": list(weights)}
    if asked.finetune_batches:
        about |= {"finetune_batches": asked.finetune_batches, "finetune_lr": asked.finetune_lr or 1e-4}
        batches = training_batches(trained, asked.finetune_batches)
        shared = kmeans.finetune(trained.model, shared, batches, about["finetune_lr"])
    tensors = {name: value.float() for name, value in weights.items() if name not in shared}
    matrices: dict[str, Any] = {}
    for name, matrix in shared.items():
        parts, matrices[name] = deep.written(name, matrix)
        tensors |= parts
    return tensors, {**about, "matrices": matrices}


def _problems(config: Config, asked: Quantization) -> Iterator[Problem]:
    method = f"--method {asked.method}"
    for name, value, reader in (("batches", asked.batches, "int8-static"), ("bits", asked.bits, "kmeans"),
                                ("finetune-batches", asked.finetune_batches, "kmeans"),
                                ("finetune-lr", asked.finetune_lr, "kmeans")):  # fmt: skip
        if value is not None and asked.method != reader:
            yield Problem((f"--{name} {value:g}", method), "this setting has no effect here",
                          f"leave it out or use --method {reader}")  # fmt: skip
    if asked.method == "kmeans" and asked.finetune_lr is not None and not asked.finetune_batches:
        yield Problem(
            (f"--finetune-lr {asked.finetune_lr:g}",), "nothing is trained", "give --finetune-batches, or leave it out"
        )
    if not asked.method.startswith("int8"):
        return
    if config.model.source is not None:
        yield Problem((method, f"model.source={config.model.source}"), "only the layers of the families have int8 forms",
                      "use fp16, bf16 or kmeans")  # fmt: skip
    if not torch.backends.mkldnn.is_available():
        yield Problem((method,), "this torch has no oneDNN, whose int8 products are used", "install torch with oneDNN")
