"""The training loop: load, step, record, evaluate, save, stop."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from disttrain import checkpoint, codec_choice, preflight
from disttrain.assembly import Session, choose_again
from disttrain.config.checks import total_steps
from disttrain.interruption import Interruption
from disttrain.optim import learning_rate
from disttrain.parallel.collectives import any_rank
from disttrain.recorder import Recorder


def train(session: Session, recorder: Recorder, interruption: Interruption, start: int = 0) -> str:
    """Train from step `start` until something says stop; returns why: steps, time, target_loss or interrupted.

    Raises Diverged when the loss is no longer a number, CheckpointFailed when a checkpoint cannot be written.
    """
    config = session.config
    steps = total_steps(config)
    assert steps is not None  # preflight refuses a run without a length
    step, saved, evaluated, stop = start, start, -1, "steps" if start >= steps else None
    while stop is None:
        recorder.begin_step()
        micro_batches = recorder.waited_for(
            session.data.micro_batches(step, session.data_rank, session.mesh.data_ranks)
        )
        step += 1
        rate = learning_rate(config.optim, step, steps)
        result = session.engine.step(micro_batches, step, rate)
        asked = interruption.requested or interruption.hosts_changed
        interrupted, late = any_rank(asked, recorder.over_time(config.train.seconds))
        stop = "interrupted" if interrupted else "steps" if step == steps else "time" if late else None
        evaluate, checkpointed = due(config.train.eval_every, step), due(config.checkpoint.every, step)
        recorder.end_step(step, rate, result, needed=bool(stop or evaluate or checkpointed))
        if evaluate:
            evaluated = step
            if recorder.evaluate(step) <= (config.train.target_loss or 0.0):
                stop = stop or "target_loss"
        if checkpointed:
            saved = step
            save(session, recorder, step)
        if session.choice is not None and stop is None and due(config.compression.look_every, step):
            look_at_link(session, recorder, step)
    if stop != "interrupted" and evaluated != step:
        recorder.evaluate(step)
    if saved != step:
        save(session, recorder, step)
    recorder.finish(step, stop)
    return stop


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0 means never."""
    return every > 0 and step % every == 0


def look_at_link(session: Session, recorder: Recorder, step: int) -> None:
    """Choose a codec anew where the link has changed, and go on from a checkpoint as after a resume."""
    assert session.choice is not None
    with recorder.excluded("choosing"):
        before, zero = session.choice, session.config.parallel.zero
        if not codec_choice.changed(before, session.groups, zero, session.device):
            return
        path = save(session, recorder, step)
        choose_again(session)
        load(session, path)
    now = session.choice
    message = f"the link has changed from {before.speed} to {now.speed}; {now.reason}"
    recorder.event("codec_chosen", step, message, **asdict(now))


def save(session: Session, recorder: Recorder, step: int) -> Path:
    """Write a checkpoint of this step, with all ranks; where."""
    with recorder.excluded("checkpoint"):
        state = session.engine.state_dict()
        trainer = {"step": step, "metrics": recorder.state_dict(), "engine": state.pop("engine")}
        folder = preflight.run_folder(session.config) / "checkpoints"
        path = checkpoint.save(folder, step, state, trainer, session.config.checkpoint.keep)
    recorder.event("checkpoint_saved", step, f"checkpoint saved: {path}")
    return path


def restore(session: Session, recorder: Recorder) -> int:
    """Load the checkpoint the config asks for and return its step; 0 for a new run."""
    path, damaged = preflight.resume_from(session.config)
    for line in damaged:
        recorder.event("checkpoint_damaged", 0, f"checkpoint not used: {line}")
    if path is None:
        return 0
    trainer = load(session, path)
    recorder.load_state_dict(trainer["metrics"])
    return trainer["step"]


def load(session: Session, path: Path) -> dict[str, Any]:
    """Fill the engine from a checkpoint; what else that holds."""
    state = session.engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    session.engine.load_state_dict({**state, "engine": trainer["engine"]})
    return trainer
