"""One rank's whole life in a run: prepare, assemble, train, report. Every outcome has an exit code (design, section 1)."""

import json
import logging
import math
import socket
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group, RenderableType

from disttrain import checkpoint, data, deepspeed_config, preflight, report
from disttrain.assembly import Session, assemble
from disttrain.config.load import dump
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.folders import exclusive, write_atomically
from disttrain.hang import files, observer
from disttrain.header import header
from disttrain.interruption import Interruption
from disttrain.labelled.loading import WORDS
from disttrain.launch import RankInfo
from disttrain.loggers import Loggers, open_loggers
from disttrain.metrics import SteadyRates
from disttrain.parallel import world
from disttrain.profiling import table as profile_table
from disttrain.recorder import Recorder
from disttrain.trainer import restore, train

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
REPORT_S = 1800.0
"""How long the other ranks wait for the first one's reports, unless run.timeout_s is longer: W&B may have much to upload."""


def run(config: Config, rank: RankInfo, interruption: Interruption, prepared: data.Prepared) -> int:
    """Train as one rank of the world; every rank calls this. Returns the exit code.

    Raises RefusedInput where the run folder is in use, Unanswered where other ranks are late or gone, Diverged,
    CheckpointFailed and TruthFailed as the loop does.
    """
    folder = preflight.run_folder(config)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    log_to(folder / "logs" / f"rank_{rank.rank:04d}.log")
    alone = exclusive(folder) if rank.rank == 0 else nullcontext()
    with alone, observer.observing(folder, rank, config.run.timeout_s) as observed:
        session = assemble(config, rank, prepared)
        try:
            if rank.rank == 0 and config.data.tokenizer == "words":
                write_atomically(folder / WORDS, prepared.tokenizer.read_text())
            reason = _train(session, folder, interruption, observed)
            world.wait_for_all()  # launchers end the ranks that are left once one has ended: rank 0 has reports to write
        finally:
            session.engine.close()
        world.stop()
    if reason == "interrupted":
        return INTERRUPTED
    return DONE


def _train(session: Session, folder: Path, interruption: Interruption, observed: observer.Observer) -> str:
    start, _ = preflight.resume_from(session.config)
    first = session.rank.rank == 0
    if not first:
        return train_from_checkpoint(session, Recorder(session, None), interruption, observed)
    checkpoint.clean(folder / "checkpoints")
    write_atomically(folder / "config.yaml", dump(session.asked))
    if session.config.engine == "deepspeed":
        theirs = deepspeed_config.translate(session.config, session.rank.world_size)
        write_atomically(folder / deepspeed_config.FILE, json.dumps(theirs, indent=1))
    began_before = (folder / "metrics.jsonl").exists() and session.config.checkpoint.resume != "never"
    resumed = checkpoint.step_of(start) if start else 0 if began_before else None
    if session.choice is not None:
        Console().print(session.choice.table(), "")
    with open_loggers(session.config, folder, header(session, resumed), resumed) as loggers:
        if session.choice is not None:
            loggers.event("codec_chosen", session.choice.reason, **asdict(session.choice))
        reason = train_from_checkpoint(session, Recorder(session, loggers), interruption, observed)
        table = drawn(folder, loggers)  # before the loggers close: sinks take the files of the report along
    if table is not None:
        Console().print(table)
    return reason


def train_from_checkpoint(
    session: Session, recorder: Recorder, interruption: Interruption, observed: observer.Observer
) -> str:
    """Load what the config says and train on from there; the reason to stop. All ranks are then waiting for the first."""
    observed.step = lambda: recorder.step
    reason = train(session, recorder, interruption, restore(session, recorder))
    observed.stop()
    world.be_patient(REPORT_S)
    return reason


def drawn(folder: Path, loggers: Loggers) -> Group | None:
    """What `draw` gives, or None and an event: a report that cannot be made does not make the training a failure."""
    try:
        return draw(folder)
    except Exception as error:
        message = f"the report failed ({type(error).__name__}: {error}); once that is mended: disttrain report {folder}"
        loggers.event("report_failed", message)
        return None


def show(folder: Path) -> None:
    """Make the report of a run and print its tables. Raises RefusedInput for an empty run."""
    Console().print(draw(folder))


def draw(folder: Path) -> Group:
    """Write summary.json of a run, draw its loss curve, return its tables. Raises RefusedInput for an empty run."""
    finished = report.read_run(folder)
    if not finished.steps:
        raise RefusedInput([Problem((f"run {folder}",), "no step was recorded yet", "train it for at least one step")])
    if finished.summary:
        write_atomically(folder / "summary.json", json.dumps(finished.summary, indent=1))
    if any(math.isfinite(step["loss"]) for step in finished.steps):
        report.loss_curve(finished, folder / "loss_curve.png")
    return Group(report.summary_table(finished), *seconds_of(finished))


def seconds_of(finished: report.Run) -> list[RenderableType]:
    """The table of a profile, after an empty line; nothing where the run has none."""
    found = profile_table.read(finished.folder)
    if found is None:
        return []
    steady = SteadyRates()
    for record in finished.steps:
        steady.add(record)
    return ["", profile_table.table(found, steady.result()["median_step_seconds"])]


def log_to(path: Path) -> None:
    """Send the log and every warning of this process to a file; the terminal stays for progress, also when the disk of the
    log is full."""
    root = logging.getLogger()
    logging.raiseExceptions = False
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.info("%s%s: %s", files.STARTED, socket.gethostname(), " ".join(sys.argv))
