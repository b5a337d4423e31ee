"""Weights & Biases: one run, logged from one process, continued under the same id after a resume."""

import os
import secrets
import shlex
from pathlib import Path
from typing import Any

from disttrain.config.schema import Config
from disttrain.loggers.scalars import scalars

ID_FILE = "wandb_id"
TIMEOUTS = {"init_timeout": 30.0, "finish_timeout": 120.0}
"""Seconds that W&B may hold up the start and the end of training; WANDB_INIT_TIMEOUT and so on win."""
REPORT = ("config.yaml", "summary.json", "loss_curve.png", "metrics.jsonl", "trace/step_seconds.json")
"""Files of the run folder that the artefact of a finished run holds."""
ALERTS = ("not_finite", "loss_spike", "rolled_back", "slow_rank")
"""Events that W&B sends to people, at most one a minute under each name."""
ARTIFACT_TYPE = "disttrain-run"
_EXIT_CODES = {"interrupted": 130}


class WandbSink:
    """Scalars of step and eval records on the axis of our steps; the header as config, the summary as summary.

    `reached_step` is the largest step that an earlier process recorded. W&B takes each step once and in order, so
    steps that are done again after a rollback are not sent again: it keeps the first values. Offline, every process
    leaves its own folder with the same id and no step in common, which `wandb sync` joins.
    """

    name = "wandb"

    def __init__(self, config: Config, run_dir: Path, reached_step: int):
        import wandb

        run_id, known = id_of(run_dir)
        self._reached = reached_step if known else 0
        self._exit_code = 1  # until a summary says that training ended by itself
        self._run_dir = run_dir
        # W&B copies an artefact's files when they are logged: beside its own data, not in the home folder, which may
        # be small or missing on a compute node.
        os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").resolve()))
        try:
            self._run = wandb.init(
                id=run_id, resume="allow", dir=str(run_dir), mode=config.log.wandb_mode, settings=quiet_settings(),
                **labels(config),
            )  # fmt: skip
        except Exception as error:
            error.add_note("without a network or a login use log.wandb_mode=offline, and upload later")
            raise
        self._offline = self._run.offline

    @property
    def url(self) -> str | None:
        """Address of the run; None offline."""
        return None if self._offline else self._run.url

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""
        kind = record["kind"]
        if kind == "header":
            rest = {key: value for key, value in record.items() if key not in ("kind", "time", "config")}
            self._run.config.update({**record.get("config", {}), "header": rest}, allow_val_change=True)
        elif kind == "summary":
            self._exit_code = _EXIT_CODES.get(record["stop_reason"], 0)
            self._run.summary.update({f"summary/{key}": value for key, value in record.items() if key != "kind"})
        elif record.get("event") in ALERTS:
            self._run.alert(title=record["event"], text=f"step {record['step']}: {record['message']}", level="WARN")
            if record["event"] == "rolled_back":
                self._reached = max(self._reached, record["details"]["from_step"])
        elif kind in ("step", "eval") and record["step"] > self._reached:
            self._run.log(scalars(record), step=record["step"])

    def close(self) -> str | None:
        """Send what is left, with the files of the report when training came to its end; what to do next, offline.

        The run gets the exit code of its process: without a summary it is marked as failed.
        """
        try:
            try:
                if self._exit_code == 0:
                    self._log_report()
            finally:
                self._run.finish(exit_code=self._exit_code)
        except Exception as error:
            error.add_note(f"what was logged is on the disk: {self._upload_command()}")
            raise
        return f"Weights & Biases was offline, upload with: {self._upload_command()}" if self._offline else None

    def _log_report(self) -> None:
        import wandb

        artifact = wandb.Artifact(f"report-{self._run.id}", type=ARTIFACT_TYPE)
        for path in (self._run_dir / name for name in REPORT):
            if path.exists():
                artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def _upload_command(self) -> str:
        """For the folders of all processes of the run at once: `wandb sync` takes them in order, each one once."""
        folder = str((self._run_dir / "wandb").resolve())
        return shlex.join(["wandb", "sync", *([] if self._offline else ["--include-online"]), folder])


def labels(config: Config) -> dict[str, Any]:
    """Where the run stands in W&B: our settings, else W&B's own variables, else a default."""
    log, environ = config.log, os.environ
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return {
        "entity": log.wandb_entity,
        "project": log.wandb_project or environ.get("WANDB_PROJECT") or "disttrain",
        "group": log.wandb_group or environ.get("WANDB_RUN_GROUP") or (f"slurm_array_{array}" if array else None),
        "tags": log.wandb_tags or None,
        "notes": log.wandb_notes,
        "name": environ.get("WANDB_NAME") or config.run.name,
    }


def quiet_settings() -> Any:
    """W&B without output of its own, and without what it would gather beside our records."""
    import wandb

    limits: dict[str, Any] = {
        name: value for name, value in TIMEOUTS.items() if f"WANDB_{name.upper()}" not in os.environ
    }
    # Output capture would fight the live console, and the header already names our commit: a git remote's URL may
    # hold a password.
    return wandb.Settings(
        console="off", silent=True, disable_git=True, disable_code=True, finish_timeout_raises=True, **limits
    )


def id_of(run_dir: Path) -> tuple[str, bool]:
    """(id of the W&B run, whether an earlier process used it); made once and kept in the run folder.

    WANDB_RUN_ID wins: a sweep's agent has made the run already, and says so there.
    """
    path = run_dir / ID_FILE
    known = path.read_text().strip() if path.exists() else ""
    run_id = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
    if run_id != known:
        path.write_text(run_id + "\n")
    return run_id, run_id == known
