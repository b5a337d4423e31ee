"""What each engine can combine: data, read by `check` and held to by a contract test. No torch.

A row names, for each feature that not every engine carries out, the settings it accepts. Whatever a config asks beyond
its engine's row is refused before anything starts. What contradicts itself on every engine is
`disttrain.config.layout_checks`'s; what a pipeline schedule can take is `disttrain.stages`'s.
"""

from typing import Any, Literal

from disttrain.config.load import all_keys
from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import given, setting

ANY: Literal["any"] = "any"
"""Every value that the schema allows."""

DEFAULT: Literal["default"] = "default"
"""Only what the schema gives when nothing is said: the section is another engine's."""

ENGINES: dict[str, dict[str, tuple | Literal["any", "default"]]] = {
    "native": {
        "precision": ANY,
        "run.compile": ANY,
        "optim.name": ANY,
        "parallel.tensor": ANY,
        "parallel.sequence": ANY,
        "parallel.pipeline": ANY,
        "parallel.schedule": ANY,
        "parallel.context": ANY,
        "parallel.context_method": ANY,
        "parallel.zero": ANY,
        "parallel.replicate": ANY,
        "parallel.offload": ANY,
        "parallel.recompute": ANY,
        "compression.codec": ANY,
        "outer.method": ANY,
        "pruning.method": ANY,
        "quantization.aware": ANY,
        "watch.on_spike": ANY,
        "watch.on_nonfinite": ANY,
        "deepspeed": ({},),
        "horovod": DEFAULT,
    },
    "deepspeed": {
        "precision": ("auto", "fp32", "bf16", "fp16"),
        "run.compile": (False,),
        "optim.name": ("adamw",),
        "parallel.tensor": (1,),
        "parallel.sequence": (False,),
        "parallel.pipeline": (1,),
        "parallel.context": (1,),
        "parallel.zero": ANY,
        "parallel.replicate": (1,),
        "parallel.offload": ANY,
        "parallel.recompute": ANY,
        "compression.codec": ("none",),
        "outer.method": ("none",),
        "pruning.method": ("none",),
        "quantization.aware": (False,),
        "watch.on_spike": ("event", "stop"),
        "watch.on_nonfinite": ("stop",),
        "deepspeed": ANY,
        "horovod": DEFAULT,
    },
    "horovod": {
        "precision": ANY,
        "run.compile": (False,),
        "optim.name": ("adamw",),
        "parallel.tensor": ANY,
        "parallel.sequence": ANY,
        "parallel.pipeline": (1,),
        "parallel.context": ANY,
        "parallel.zero": (0,),
        "parallel.replicate": (1,),
        "parallel.offload": (False,),
        "parallel.recompute": ANY,
        "compression.codec": ("none",),
        "outer.method": ("none",),
        "pruning.method": ("none",),
        "quantization.aware": (False,),
        "watch.on_spike": ("event", "stop"),
        "watch.on_nonfinite": ("stop", "skip"),
        "deepspeed": ({},),
        "horovod": ANY,
    },
}

WHY: dict[tuple[str, str], str] = {
    (
        "deepspeed",
        "optim.name",
    ): "it cuts all parameters as one flat list without their shapes, and its state is read as AdamW's",
    ("horovod", "optim.name"): "it makes the optimizer anew from its parameter groups, which was proven for AdamW only",
}
"""Of an engine and a setting of its row: why it takes no other values."""


def missing(config: Config) -> list[Problem]:
    """Every setting that the chosen engine cannot carry out."""
    return [problem for key, accepted in ENGINES[config.engine].items() if (problem := _refused(config, key, accepted))]


def _refused(config: Config, key: str, accepted: tuple | Literal["any", "default"]) -> Problem | None:
    if accepted == ANY:
        return None
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if accepted == DEFAULT:
        accepted = (type(value)(),)
    if value in accepted:
        return None
    if key in ENGINES:  # the section of another engine
        names = value if isinstance(value, dict) else [n for n in all_keys(type(value)) if given(config, f"{key}.{n}")]
        settings = (f"engine={config.engine}", *(f"{key}.{name}" for name in names))
        return Problem(settings, f"only engine {key} reads these settings", f"remove them or use engine={key}")
    fix = f"use {key}={' or '.join(str(v).lower() if isinstance(v, bool) else str(v) for v in accepted)}"
    why = WHY.get((config.engine, key))
    message = f"engine {config.engine} cannot do {setting(config, key)}" + (f": {why}" if why else "")
    return Problem((f"engine={config.engine}", setting(config, key)), message, fix)


def table() -> str:
    """What each engine can combine, as Markdown: the table of docs/engines.md and the README."""
    head = ["setting", *ENGINES]
    lines = [head, ["---"] * len(head)]
    for key in dict.fromkeys(key for row in ENGINES.values() for key in row):
        lines.append([f"`{key}`", *(_cell(row.get(key, ANY)) for row in ENGINES.values())])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(accepted: tuple | Literal["any", "default"]) -> str:
    if isinstance(accepted, str):
        return {ANY: "any", DEFAULT: "-"}[accepted]
    names = [str(value).lower() if isinstance(value, bool) else str(value) for value in accepted if value != {}]
    return ", ".join(names) or "-"
