"""What each engine can combine: data, read by `check` and held to by a contract test. No torch.

A row names, for each feature that an engine carries out, the settings it accepts. Whatever a config asks beyond its
engine's row is refused before anything starts.
"""

from disttrain.config.checks import given
from disttrain.config.problems import Problem
from disttrain.config.schema import Config

ENGINES: dict[str, dict[str, tuple]] = {
    "native": {
        "precision": ("auto", "fp32", "bf16", "fp16", "fp64"),
        "parallel.tensor": (1,),
        "parallel.sequence": (False,),
        "parallel.pipeline": (1,),
        "parallel.context": (1,),
        "parallel.zero": (0,),
        "parallel.replicate": (1,),
        "parallel.recompute": ("none",),
        "compression.codec": ("none",),
    },
}


def missing(config: Config) -> list[Problem]:
    """Every setting that the chosen engine cannot carry out."""
    if config.engine not in ENGINES:
        fix = f"use one of: {', '.join(ENGINES)}"
        return [Problem((f"engine={config.engine}",), "this engine is not part of this version", fix)]
    problems = []
    for key, accepted in ENGINES[config.engine].items():
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        if value not in accepted:
            message = f"engine {config.engine} cannot do {key}={value}"
            fix = f"use {key}={' or '.join(str(v).lower() if isinstance(v, bool) else str(v) for v in accepted)}"
            problems.append(Problem((f"engine={config.engine}", f"{key}={value}"), message, fix))
    if config.parallel.pipeline == 1 and given(config, "parallel.schedule"):
        settings = (f"parallel.schedule={config.parallel.schedule}", "parallel.pipeline=1")
        problems.append(
            Problem(settings, "a pipeline schedule has no effect without stages", "remove parallel.schedule")
        )
    return problems
