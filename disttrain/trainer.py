"""The training loop: load, step, record, evaluate, save, stop."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from disttrain import checkpoint, codec_choice, preflight, ranges
from disttrain.assembly import Session, choose_again, renew
from disttrain.config.checks import total_steps
from disttrain.config.schema import TrainConfig
from disttrain.interruption import Interruption
from disttrain.optim import learning_rate
from disttrain.parallel.collectives import any_rank, gather_objects
from disttrain.recorder import Recorder
from disttrain.saving import Saver


def train(session: Session, recorder: Recorder, interruption: Interruption, start: int = 0) -> str:
    """Train from step `start` until something says stop; returns why: steps, time, target_loss, patience or interrupted.

    Raises Diverged when the loss is no longer a number, CheckpointFailed when a checkpoint cannot be written.
    """
    folder = preflight.run_folder(session.config) / "checkpoints"
    with Saver(folder, session.config.checkpoint, session.device) as saver, recorder.closing():
        return _train(session, recorder, interruption, saver, start)


def _train(session: Session, recorder: Recorder, interruption: Interruption, saver: Saver, start: int) -> str:
    config = session.config
    steps = total_steps(config)
    assert steps is not None  # preflight refuses a run without a length
    step, saved, stop = start, start, "steps" if start >= steps else None
    held_out: tuple[int, float] = (-1, 0.0)
    """Step and loss of the last evaluation."""
    while stop is None:
        recorder.begin_step(step + 1)
        micro_batches = recorder.waited_for(
            session.data.micro_batches(recorder.watch.position(step), session.data_rank, session.mesh.data_ranks)
        )
        step += 1
        rate = learning_rate(config.optim, step, steps)
        with ranges.named("engine"):
            result = session.engine.step(micro_batches, step, rate)
        asked = interruption.requested or interruption.hosts_changed
        interrupted, late, unsaved = any_rank(asked, recorder.over_time(config.train.seconds), saver.failed)
        if unsaved:
            saver.wait()  # raises on every rank
        stop = "interrupted" if interrupted else "steps" if step == steps else "time" if late else None
        evaluate, checkpointed = due(config.train.eval_every, step), due(config.checkpoint.every, step)
        harmful = recorder.end_step(step, rate, result, needed=bool(stop or evaluate or checkpointed))
        if harmful:
            saved, held_out = roll_back(session, recorder, saver, step)
            step, stop = saved, None if stop == "steps" else stop
            continue
        if evaluate:
            held_out = step, recorder.evaluate(step)
            stop = stop or enough(config.train, held_out[1], recorder.best_step, step)
        if checkpointed:
            saved = step
            save(session, recorder, saver, step, held_out, beside=stop is None)
        report_saved(recorder, saver)
        if session.choice is not None and stop is None and due(config.compression.look_every, step):
            saved = look_at_link(session, recorder, saver, step, held_out, saved)
    if stop != "interrupted" and held_out[0] != step:
        held_out = step, recorder.evaluate(step)
    if saved != step:
        save(session, recorder, saver, step, held_out, beside=False)
    recorder.finish(step, stop)
    return stop


def enough(train: TrainConfig, loss: float, best: int | None, step: int) -> str | None:
    """Why an evaluation ends a run: its loss is low enough, or as many in a row as train.patience were not better than that
    of step `best`; None if it does not."""
    if loss <= (train.target_loss or 0.0):
        return "target_loss"
    if train.patience is not None and best is not None and step - best >= train.patience * train.eval_every:
        return "patience"
    return None


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0 means never."""
    return every > 0 and step % every == 0


def look_at_link(
    session: Session, recorder: Recorder, saver: Saver, step: int, held_out: tuple[int, float], saved: int
) -> int:
    """Choose a codec anew where the link has changed, and go on from a checkpoint as after a resume; step of the newest
    checkpoint."""
    assert session.choice is not None
    with recorder.excluded("choosing"):
        before, zero = session.choice, session.config.parallel.zero
        if not codec_choice.changed(before, session.groups, zero, session.device):
            return saved
        if saved != step:
            save(session, recorder, saver, step, held_out, beside=False)
        saver.wait()
        choose_again(session)
        load(session, checkpoint.path_of(saver.folder, step))
    now = session.choice
    message = f"the link has changed from {before.speed} to {now.speed}; {now.reason}"
    recorder.event("codec_chosen", step, message, **asdict(now))
    return step


def roll_back(session: Session, recorder: Recorder, saver: Saver, step: int) -> tuple[int, tuple[int, float]]:
    """Go back to the newest good checkpoint before `step`, as after a resume, and on with the data after `step`; the step
    gone back to, and step and loss of its evaluation. It is saved anew, so that a resume goes on with that data too."""
    with recorder.excluded("checkpoint"):
        saver.wait()
        own = preflight.before(session.config, step) if session.rank.rank == 0 else (None, [])
        path, damaged = gather_objects(own)[0]
        renew(session)
        trainer = {} if path is None else load(session, path)
    tell_damage(recorder, step, damaged)
    if path is None:
        begin(session, recorder)
    to, loss = trainer.get("step", 0), trainer.get("eval_loss")
    recorder.roll_back(step, to, trainer)
    held_out = (-1, 0.0) if loss is None else (to, loss)
    save(session, recorder, saver, to, held_out, beside=False)
    return to, held_out


def save(
    session: Session, recorder: Recorder, saver: Saver, step: int, held_out: tuple[int, float], beside: bool
) -> None:
    """Write a checkpoint of this step, with all ranks, and with the held-out loss if that is of this step.

    It may be written `beside` the next steps, or is waited for.
    """
    with recorder.excluded("checkpoint"):
        state = session.engine.state_dict()
        loss = held_out[1] if held_out[0] == step else None
        trainer = {"step": step, "eval_loss": loss, "metrics": recorder.state_dict(), "engine": state.pop("engine"),
                   "watch": recorder.watch.state_dict()}  # fmt: skip
        saver.save(step, state, trainer, beside)
    report_saved(recorder, saver)


def report_saved(recorder: Recorder, saver: Saver) -> None:
    """An event for each checkpoint that is written by now."""
    for saved in saver.take_done():
        message, seconds = f"checkpoint saved: {saved.path}", saved.write_seconds
        recorder.event("checkpoint_saved", saved.step, message, write_seconds=seconds)


def restore(session: Session, recorder: Recorder) -> int:
    """Load the checkpoint the config asks for and return its step; 0 for a new run."""
    path, damaged = preflight.resume_from(session.config)
    tell_damage(recorder, 0, damaged)
    if path is None:
        begin(session, recorder)
        return 0
    trainer = load(session, path)
    recorder.load_state_dict(trainer["metrics"])
    recorder.watch.load_state_dict(trainer.get("watch", {}))
    step = trainer["step"]
    if "outer_arrives" in trainer["engine"] and session.config.outer.method == "none":
        message = (
            "without outer.method the run goes on from the outer weights: what workers did since they met is dropped"
        )
        recorder.event("workers_dropped", step, message)
    return step


def tell_damage(recorder: Recorder, step: int, damaged: list[str]) -> None:
    """An event for each checkpoint that was passed over."""
    for line in damaged:
        recorder.event("checkpoint_damaged", step, f"checkpoint not used: {line}")


def begin(session: Session, recorder: Recorder) -> None:
    """A new run: with the weights that were drawn, or with those the config names."""
    path = preflight.weights_from(session.config)
    if path is None:
        return
    fresh, there = session.engine.state_dict(), checkpoint.shapes(path)
    taken = {name: weight for name, weight in fresh["model"].items() if f"model.{name}" in there}
    checkpoint.load(path, {"model": taken})
    session.engine.load_state_dict({key: fresh[key] for key in ("model", "optimizer", "engine")})
    new = sorted({name for names in gather_objects(list(fresh["model"].keys() - taken.keys())) for name in names})
    but = f", but for new ones: {', '.join(new)}" if new else ""
    recorder.event("weights_loaded", 0, f"the run begins with the weights of {path}{but}")


def load(session: Session, path: Path) -> dict[str, Any]:
    """Fill the engine from a checkpoint; what else that holds."""
    state = session.engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    session.engine.load_state_dict({**state, "engine": trainer["engine"]})
    return trainer
