"""The comparison in Weights & Biases: a table and the report's files, as one run beside those it compares. No torch."""

import os
import sys
from pathlib import Path
from typing import Any

from disttrain.compare.columns import columns
from disttrain.compare.comparison import Comparison
from disttrain.compare.report import FILES
from disttrain.config.schema import Config
from disttrain.loggers.wandb import id_of, labels, quiet_settings

ARTIFACT_TYPE = "disttrain-comparison"


def publish(comparison: Comparison, config: Config, folder: Path) -> None:
    """Log table and files; where W&B fails, one line says so and nothing else is touched.

    `config` is what the strategies have in common; its `log.wandb_*` say where. The run's id is kept in the folder, so
    that a comparison that goes on is one run in W&B.
    """
    try:
        _publish(comparison, config, folder)
    except Exception as error:
        print(f"disttrain: W&B failed ({type(error).__name__}: {error}); the report is in {folder}", file=sys.stderr)


def _publish(comparison: Comparison, config: Config, folder: Path) -> None:
    import wandb

    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").resolve()))
    (folder / "wandb").mkdir(exist_ok=True)
    number, _ = id_of(folder)
    where = {**labels(config), "name": f"comparison {folder.name}"}
    run = wandb.init(id=number, resume="allow", dir=str(folder), mode=config.log.wandb_mode, job_type="comparison",
                     settings=quiet_settings(), **where)  # fmt: skip
    shown = columns(comparison)
    rows: list[Any] = [
        [s.name, s.name in comparison.front, " ".join(s.group.settings), *(s.values[c.key] for c in shown)]
        for s in comparison.strategies
    ]
    names: list[Any] = ["strategy", "pareto_front", "settings", *(c.key for c in shown)]
    run.log({"strategies": wandb.Table(columns=names, data=rows)})
    for s in comparison.strategies:
        run.summary[f"tokens_per_second/{s.name}"] = s.values["tokens_per_second"]
    artifact = wandb.Artifact(f"comparison-{number}", type=ARTIFACT_TYPE)
    for name in FILES:
        artifact.add_file(str(folder / name))
    run.log_artifact(artifact)
    run.finish()
