"""Weights & Biases: one run, logged from one process, continued under the same id after a resume."""

import secrets
from pathlib import Path
from typing import Any

from disttrain.config.schema import Config
from disttrain.loggers.scalars import scalars

ID_FILE = "wandb_id"


class WandbSink:
    """Scalars of step and eval records on the axis of our steps; the header as config, the summary as summary.

    `reached_step` is the largest step that an earlier process recorded. W&B takes each step once and in order, so
    steps that are done again after a rollback are not sent again: it keeps the first values. Offline, every process
    leaves its own folder with the same id and no step in common, which `wandb sync --append` joins.
    """

    name = "wandb"

    def __init__(self, config: Config, run_dir: Path, reached_step: int):
        import wandb

        run_id, known = _run_id(run_dir)
        self._reached = reached_step if known else 0
        self._finished = False
        # Output capture would fight the live console, and the header already names our commit: a git remote's URL
        # may hold a password.
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        self._run = wandb.init(
            project=config.log.wandb_project or "disttrain",
            name=config.run.name,
            id=run_id,
            resume="allow",
            mode=config.log.wandb_mode,
            dir=str(run_dir),
            settings=settings,
        )

    @property
    def url(self) -> str | None:
        """Address of the run; None offline."""
        return None if self._run.offline else self._run.url

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""
        kind = record["kind"]
        if kind == "header":
            rest = {key: value for key, value in record.items() if key not in ("kind", "time", "config")}
            self._run.config.update({**record.get("config", {}), "header": rest}, allow_val_change=True)
        elif kind == "summary":
            self._finished = True
            self._run.summary.update({f"summary/{key}": value for key, value in record.items() if key != "kind"})
        elif kind in ("step", "eval") and record["step"] > self._reached:
            self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        """Send what is left. A run that ends without a summary is marked as failed."""
        self._run.finish(exit_code=0 if self._finished else 1)


def _run_id(run_dir: Path) -> tuple[str, bool]:
    """(id of the W&B run, whether an earlier process used it); made once and kept in the run folder."""
    path = run_dir / ID_FILE
    known = path.read_text().strip() if path.exists() else ""
    if known:
        return known, True
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n")
    return run_id, False
