"""Turns what a step did into records: reads the device once per record, gathers the ranks, writes on rank 0."""

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch

from disttrain import layout, ranges, scoring
from disttrain.assembly import Session
from disttrain.config.checks import total_steps
from disttrain.engines import StepResult
from disttrain.loggers import Loggers
from disttrain.metrics import Metrics, RankReading, StepReading, energy, read_rank
from disttrain.parallel.collectives import gather_objects
from disttrain.preflight import run_folder
from disttrain.profiling import Place, Profile, Told
from disttrain.watch import Diverged, Finding, Watch

T = TypeVar("T")


class Recorder:
    """Every rank has one and calls it at the same points; `loggers` is None on all ranks but 0."""

    def __init__(self, session: Session, loggers: Loggers | None):
        self._session, self._loggers = session, loggers
        self._every = session.config.log.every
        world_size = session.rank.world_size
        self._metrics = Metrics(
            world_size,
            session.flops,
            session.peak_flops and session.peak_flops[0],
            bubble_theory=layout.bubble(session.config, world_size),
        )
        self._pending: list[StepResult] = []
        self._data_seconds = 0.0
        self._energy = energy.Interval(session.meter)
        self.step: int | None = None
        """The last step that ended; None before the first of this process."""
        self._stage = session.mesh.coordinates(session.rank.rank)["pipeline"]
        self.watch = Watch(session.config.watch)
        self._profile = _profile(session) if session.config.profile.enabled else None

    def begin_step(self, step: int) -> None:
        """A step begins, before its batch is asked for."""
        if self._profile is not None:
            with self.excluded("profiling"):
                self._profile.prepare(step)
        self._energy.begin()
        self._metrics.throughput.begin_step()

    def waited_for(self, items: Iterable[T]) -> list[T]:
        """The items, and the time it took to get them is kept as data_seconds."""
        began = time.perf_counter()
        with ranges.named("data"):
            gathered = list(items)
        self._data_seconds += time.perf_counter() - began
        return gathered

    def end_step(self, step: int, learning_rate: float, result: StepResult, needed: bool) -> bool:
        """A step ended; a record is written every `log.every` steps, and when the totals are needed now.

        Returns whether the run has to go back to a checkpoint, the same on all ranks. Raises Diverged.
        """
        self.step = step
        self._pending.append(result)
        profile = self._profile
        due = needed or step % self._every == 0 or (profile is not None and profile.wants_record_of(step))
        counts = self._read_counts() if due else (0, 0, 0)  # waits for the device
        sequences = self._session.config.train.global_batch_size
        looked_at = profile is not None and profile.looks_at(step)
        self._metrics.throughput.end_step(*counts, sequences=sequences, skipped=result.skipped, profiled=looked_at)
        joules = self._energy.end() if due else None
        if profile is not None:
            profile.ended(step)
        findings = [self.watch.skip(step, result.skipped)]
        if due:
            findings += self._write(step, learning_rate, result, joules)
        if profile is not None:
            with self.excluded("profiling"):
                self._tell(step, profile.recorded(step))
        return self._answer(step, [finding for finding in findings if finding is not None])

    def evaluate(self, step: int) -> float:
        """Evaluate on held-out sequences, write the record and return the held-out loss (nats)."""
        with self.excluded("evaluation"):
            session = self._session
            total = session.data.held_out_sequences
            count = min(session.config.train.eval_sequences or total, total)
            sums = session.engine.evaluate(batch for _, batch in scoring.held_out_share(session, count))
            official = scoring.official_scores(session, count)
            means = {name: float(sum_) / max(float(n), 1.0) for name, (sum_, n) in sums.items()}
        losses = {name: mean for name, mean in means.items() if not name.endswith("_accuracy")}
        scores = {name: mean for name, mean in means.items() if name not in losses}
        scores |= {f"score_{name}": value for name, value in official.items()}
        record = self._metrics.eval_record(step, losses, scores, count)
        self._emit(record)
        return record["eval_loss"]

    @property
    def best_step(self) -> int | None:
        """Step of the lowest held-out loss, those before a resume included."""
        return self._metrics.best_step

    def event(self, name: str, step: int, message: str, **details: Any) -> None:
        """Write an event: its name, one sentence for a person, and details (JSON values) for a program."""
        if self._loggers is not None:
            self._loggers.event(name, message, step, **details)

    def finish(self, step: int, reason: str) -> None:
        """End a profile that still goes on, and write the summary."""
        if self._profile is not None:
            with self.excluded("profiling"):
                self._tell(step, self._profile.finish())
        self._emit(self._metrics.summary_record(step, reason))

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Stop what is still recorded when the block ends, by an error too."""
        try:
            yield
        finally:
            if self._profile is not None:
                self._profile.abandon()

    def excluded(self, kind: str) -> AbstractContextManager[None]:
        """A block that is no training: its time counts in no rate."""
        return self._metrics.throughput.excluded(kind)

    def over_time(self, seconds: float | None) -> bool:
        """Whether training took longer than this, by the clock of rank 0."""
        return bool(seconds and self._session.rank.rank == 0 and self._metrics.throughput.train_seconds >= seconds)

    def roll_back(self, step: int, to: int, trainer: Mapping[str, Any]) -> None:
        """The run has gone back from `step` to the checkpoint of step `to` with this trainer's part; empty: to its start."""
        config = self._session.config
        if self._profile is not None:
            with self.excluded("profiling"):
                self._tell(step, self._profile.finish("the run went back"))
        self._metrics.roll_back(trainer.get("metrics", {}))
        batch_tokens = config.train.global_batch_size * config.data.sequence_length
        said = self.watch.roll_back(step, to, trainer.get("watch", {}), batch_tokens)
        self.event(said.event, step, said.message, **said.details)

    def state_dict(self) -> dict[str, Any]:
        """Totals of the run, plain numbers."""
        return self._metrics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the totals of an earlier process."""
        self._metrics.load_state_dict(state)

    def _read_counts(self) -> tuple[int, int, int]:
        """(tokens, target tokens, padding) of all pending steps; empties the list."""
        tokens = int(torch.stack([r.tokens for r in self._pending]).sum())
        targets = int(torch.stack([next(iter(r.losses.values())).count for r in self._pending]).sum())
        padding = sum(r.positions for r in self._pending) - tokens
        self._pending = []
        return tokens, targets, padding

    def _write(self, step: int, learning_rate: float, result: StepResult, joules: float | None) -> list[Finding | None]:
        """Write the step record; what there is to say of it. All judge by the numbers of rank 0."""
        with self.excluded("logging"):
            traffic = self._session.engine.traffic()
            busy, seconds = self._session.engine.bubble() or (None, None)
            reading = read_rank(
                self._session.rank.rank, self._session.device.type,
                comm_bytes=traffic.handed, comm_bytes_uncompressed=traffic.uncompressed, wire_bytes=traffic.on_wire,
                data_seconds=self._data_seconds,
                pipeline_busy_seconds=busy, pipeline_seconds=seconds,
                compute_seconds=self._session.engine.forward_seconds() if busy is None else busy,
                energy_joules=joules, stage=self._stage, host=platform.node(),
            )  # fmt: skip
            self._data_seconds = 0.0
            losses = {name: float(loss.sum) / max(int(loss.count), 1) for name, loss in result.losses.items()}
            gathered = gather_objects((reading, losses, float(result.grad_norm)))
            readings: list[RankReading] = [entry[0] for entry in gathered]
            _, losses, norm = gathered[0]
            limit = self._session.config.train.clip_grad_norm
            record = self._metrics.step_record(StepReading(
                step=step, losses=losses, learning_rate=learning_rate, grad_norm=norm,
                gradient_clip_factor=None if limit is None else min(1.0, limit / (norm + 1e-6)),
                loss_scale=result.loss_scale if self._session.config.precision == "fp16" else None,
                predicted_step_seconds=choice.best.step_s if (choice := self._session.choice) else None,
                ranks=readings,
            ))  # fmt: skip
            self._emit(record)
        return [self.watch.judge(step, record["loss"], norm, result.skipped), *self.watch.slow_ranks(readings, record)]

    def _answer(self, step: int, findings: list[Finding]) -> bool:
        """Write findings down; whether one of them asks for a rollback. Raises Diverged where one says stop."""
        for finding in findings:
            self.event(finding.event, step, finding.message, **finding.details)
            if finding.action == "stop":
                raise Diverged(f"{finding.message}: lower optim.lr")
        return any(finding.action == "rollback" for finding in findings)

    def _tell(self, step: int, told: Told | None) -> None:
        if told is not None:
            self.event(told.event, step, told.message, **told.details)

    def _emit(self, record: dict[str, Any]) -> None:
        if self._loggers is not None:
            self._loggers.write(record)


def _profile(session: Session) -> Profile:
    config, total = session.config, total_steps(session.config)
    assert total is not None  # preflight refuses a run without a length
    place = Place(session.rank.rank, session.device.type, config.engine, run_folder(config), total)
    return Profile(config.profile, place, lambda: session.engine)
