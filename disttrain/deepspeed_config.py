"""Our config in DeepSpeed's words: every setting mapped or refused, the user's raw settings merged in. No torch.

What DeepSpeed does by itself and we do not want is said outright: it clips at 1.0 unless told otherwise, replaces a
torch optimizer when it offloads, and scales low precision at stage 0 wrongly (docs/engines.md has the whole list).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from disttrain.config.checks import micro_batches
from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import setting

FILE = "deepspeed.json"
"""Name in the run folder."""

OURS: dict[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.clip_grad_norm",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_optimization.offload_param": "parallel.offload",
    "zero_force_ds_cpu_optimizer": "optim.name",
    "fp16": "precision and loss_scale",
    "bf16": "precision",
    "torch_autocast": "precision",
    "amp": "precision",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "activation_checkpointing": "parallel.recompute",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
    "steps_per_print": "log.every",
    "seed": "run.seed",
}
"""DeepSpeed's settings that follow from ours, and from which."""

NOT_SUPPORTED: dict[str, str] = {
    "sequence_parallel_size": "it does not sum gradients over sequence ranks at stages 0 to 2",
    "tensor_parallel": "this engine is data-parallel; use engine=native with parallel.tensor",
    "autotp_size": "this engine is data-parallel; use engine=native with parallel.tensor",
    "pipeline": "this engine is data-parallel; use engine=native with parallel.pipeline",
    "gradient_predivide_factor": "losses are divided by the targets of the whole step already",
    "prescale_gradients": "losses are divided by the targets of the whole step already",
    "managed_gradient_accumulation": "this engine says itself when gradients are complete",
    "zero_optimization.mics_shard_size": "it does not run in this DeepSpeed",
    "zero_optimization.zero_hpz_partition_size": "checkpoints could not be read back",
    "zero_optimization.zero_quantized_weights": "weights would no longer be those of one process",
    "zero_optimization.zero_quantized_gradients": "gradients would no longer be those of one process",
}
"""DeepSpeed's settings that this engine does not carry out, and why."""

FREE = ("zero_optimization", "comms_logger", "flops_profiler", "communication_data_type", "wall_clock_breakdown",
        "memory_breakdown", "dump_state", "disable_allgather", "data_types", "csv_monitor", "aio",
        "timers", "dataloader_drop_last")  # fmt: skip
"""Top-level settings that a user may give. DeepSpeed takes unknown ones without a word, so we refuse them."""


def translate(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings for this run. `precision` and `train.micro_batch_size` may be open still (auto, all)."""
    train, parallel = config.train, config.parallel
    count = micro_batches(config, world_size) or 1
    share = train.global_batch_size // world_size
    zero: dict[str, Any] = {"stage": parallel.zero}
    if parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.run.device == "cuda"}
        if parallel.zero == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": config.run.device == "cuda"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size or share,
        "gradient_accumulation_steps": count,
        "gradient_clipping": train.clip_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        **_precision(config),
    }
    return _merged(ours, config.deepspeed)


def _precision(config: Config) -> dict[str, Any]:
    """Low precision by DeepSpeed's own copies of the weights where ZeRO keeps masters, else by autocast."""
    if config.precision == "bf16":
        if config.parallel.zero == 0:
            return {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        return {"bf16": {"enabled": True}}
    if config.precision == "fp16":
        scale = config.loss_scale
        return {"fp16": {
            "enabled": True, "loss_scale": 0, "initial_scale_power": int(math.log2(scale.initial)),
            "loss_scale_window": scale.growth_interval, "hysteresis": 1, "min_loss_scale": scale.minimum,
        }}  # fmt: skip
    return {}


def problems(config: Config) -> list[Problem]:
    """Why DeepSpeed cannot train this config as it is meant; [] for other engines."""
    if config.engine != "deepspeed":
        return []
    return [
        *_low_precision(config),
        *(problem for key, value in _flat(config.deepspeed) for problem in _raw(key, value)),
    ]


def _low_precision(config: Config) -> Iterator[Problem]:
    if config.precision != "fp16":
        return
    if config.parallel.zero == 0:
        yield Problem(
            ("engine=deepspeed", "precision=fp16", "parallel.zero=0"),
            "at stage 0 DeepSpeed divides fp16 gradients by a loss scale that it never multiplied the loss with",
            "use parallel.zero=1 or more, or precision=bf16",
        )
    if not math.log2(config.loss_scale.initial).is_integer():
        yield Problem(
            ("engine=deepspeed", setting(config, "loss_scale.initial")),
            "DeepSpeed starts from a power of two",
            f"use loss_scale.initial={2.0 ** round(math.log2(config.loss_scale.initial)):g}",
        )


def _raw(key: str, value: object) -> Iterator[Problem]:
    """What is wrong with one of the user's raw settings, by its dotted name."""
    names = [".".join(key.split(".")[: n + 1]) for n in range(key.count(".") + 1)]
    ours = next((name for name in names if name in OURS), None)
    refused = next((name for name in names if name in NOT_SUPPORTED), None)
    given = f"deepspeed.{key}={value}"
    if ours:
        yield Problem((given, OURS[ours]), f"deepspeed.{ours} follows from {OURS[ours]}, which may say otherwise",
                      f"remove it and set {OURS[ours]}")  # fmt: skip
    elif refused:
        yield Problem(
            (given,), f"{refused} cannot be used here: {NOT_SUPPORTED[refused]}", f"remove deepspeed.{refused}"
        )
    elif names[0] not in FREE:
        yield Problem((given,), "this is none of the DeepSpeed settings that can be given here",
                      f"use one of {', '.join(FREE)}")  # fmt: skip


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merged(ours: dict[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(ours)
    for key, value in raw.items():
        known = both.get(key)
        both[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return both
