"""What each engine can combine: data, read by `check` and held to by a contract test. No torch.

A row names, for each feature that not every engine carries out, the settings it accepts. Whatever a config asks beyond
its engine's row is refused before anything starts. What contradicts itself on every engine is
`disttrain.config.layout_checks`'s; what a pipeline schedule can take is `disttrain.stages`'s.
"""

from typing import Literal

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import setting

ANY: Literal["any"] = "any"
"""Every value that the schema allows."""

ENGINES: dict[str, dict[str, tuple | Literal["any"]]] = {
    "native": {
        "precision": ANY,
        "run.compile": ANY,
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
        if accepted != ANY and value not in accepted:
            message = f"engine {config.engine} cannot do {setting(config, key)}"
            fix = f"use {key}={' or '.join(str(v).lower() if isinstance(v, bool) else str(v) for v in accepted)}"
            problems.append(Problem((f"engine={config.engine}", setting(config, key)), message, fix))
    return problems
