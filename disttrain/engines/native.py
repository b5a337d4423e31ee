"""The torch-native engine: one optimizer step under any layout. What a layout changes is in `disttrain.parallel`."""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from disttrain import ranges
from disttrain.config.checks import total_steps
from disttrain.config.schema import ONE_BIT, Config, Precision
from disttrain.engines import Batch, Held, Moment, Reduction, Saved, State, StepResult, objective
from disttrain.engines.looking import Of, looking, outputs, predictions_of, scores_of
from disttrain.engines.native_state import NativeState, make_compressor
from disttrain.grad_compression.compressor import Compressor, Known
from disttrain.models import Model
from disttrain.models.layers import LossSum
from disttrain.optim import OneBitAdamW, OneBitLamb, build_optimizer
from disttrain.parallel import data, gradients, penalties, sharding
from disttrain.parallel.collectives import Counted, reduce_over
from disttrain.parallel.groups import Groups, beside
from disttrain.parallel.outer import OuterSteps
from disttrain.parallel.parallelize import parallelize
from disttrain.parallel.pipeline import Pipeline
from disttrain.parallel.pruned import pruned
from disttrain.parallel.stage import Clock
from disttrain.parallel.whole import parts_of
from disttrain.precision import LossScale, autocast, master_dtype


class NativeEngine:
    """One optimizer step with torch alone. `precision` is resolved, never "auto". All ranks make theirs together.

    A `reduction` sums gradients over the data ranks, and updates, in place of DDP and of the optimizer's own step. A
    `compressor` sums them in place of one that the config describes.
    """

    def __init__(
        self, config: Config, groups: Groups, device: torch.device, precision: Precision,
        reduction: Reduction | None = None, compressor: Compressor | None = None,
    ):  # fmt: skip
        self.config, self.groups, self.device = config, groups, device
        self.precision: Precision = precision
        self.scale = LossScale.start(precision, config.loss_scale)
        apart = config.outer.method != "none"
        self._workers = link = groups.coded(config.parallel.zero)
        if config.outer.overlap:
            link = beside(groups, config.parallel.zero)
        self._compressor = compressor or make_compressor(config, link)
        summed = reduction is None and not apart
        self.chunks = parallelize(config, groups, device, precision, summed, self._compressor, apart)
        self.parameters = [p for chunk in self.chunks for p in chunk.parameters if p.parameter.requires_grad]
        masters = [(p.shard.name, p.master) for p in self.parameters]
        self._inner = groups.inner(config.parallel.zero) if apart else groups.data
        """Data ranks whose gradients are summed every step."""
        parts = parts_of(self.parameters, groups, self._inner, device)
        self.optimizer = build_optimizer(config.optim, masters, config.compression.codec, parts, config.model.heads)
        self._reduction = reduction
        if reduction is not None:
            self.optimizer = reduction.attach(self.optimizer, masters)
        self._outer = None
        if apart:
            state = self.optimizer.state
            self._outer = OuterSteps(config.outer, self.parameters, groups, link, self._compressor, state)
        self._late: dict[str, Tensor] = {}
        """What a codec of before has left behind: a part of the next step's gradient."""
        self._pipeline = self._make_pipeline() if groups.mesh.pipeline > 1 else None
        self._clock = Clock(device)
        self._settled = not any(isinstance(chunk.module, DistributedDataParallel) for chunk in self.chunks)
        self.watch: Callable[[Moment], None] | None = None
        """Called within a step when gradients are complete but still scaled, when clipped, and when updated: for proofs."""

    def _make_pipeline(self) -> Pipeline:
        train, mesh = self.config.train, self.groups.mesh
        share = train.global_batch_size // mesh.data_ranks
        size = train.micro_batch_size or share
        return Pipeline(
            [(chunk.number, chunk.model) for chunk in self.chunks],
            self.groups.pipeline,
            self.config.parallel.schedule,
            share // size,
            self.device,
            self._hidden_shape(size, self.config.data.sequence_length // mesh.context),
            master_dtype(self.precision),
            self.config.parallel.zero,
        )

    def step(self, micro_batches: Sequence[Batch], step: int, learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches; see `Engine.step`."""
        for chunk in self.chunks:
            chunk.model.train()
        batches = [self._prepare(batch) for batch in micro_batches]
        divided, counts, tokens = self._count(batches)
        coder = self._compressor if self._outer is None else None  # of gradients
        if coder is not None:
            coder.begin(step, self.scale.value, self._skips or not self._settled, self._known(step))
        sums = self._forward_and_backward(batches, divided)
        totals = reduce_over(self.groups.world, sums)
        if self._reduction is not None:
            self._reduction.complete()
        reduced = self._pipeline is None and not self.config.parallel.zero
        scale, train = self.scale.value, self.config.train
        gradients.complete(self.parameters, self.groups, self._tied, reduced, coder, self._inner, self._late, scale)
        penalties.add_gradients(self.parameters, train.l1_penalty, train.l2_penalty, scale)
        self._tell("reduced")
        norm, skipped = self._unscale_and_clip(totals)
        self._tell("clipped")
        if not skipped:
            self._update(step, learning_rate)
            self._late = {}
            if coder is not None:
                coder.keep()
        for p in self.parameters:
            p.parameter.grad = p.master.grad = None
        if self._outer is not None:
            self._outer.after(step, last=step == total_steps(self.config))
        self.scale = self.scale.after(skipped)
        self._tell("updated")
        losses = {name: LossSum(totals[i], counts[name]) for i, name in enumerate(counts)}
        positions = sum(batch["tokens"].size for batch in micro_batches) * self.groups.mesh.data_ranks
        return StepResult(losses, tokens, positions, norm, scale, skipped)

    @property
    def _skips(self) -> bool:
        return self.scale.dynamic or self.config.watch.on_nonfinite == "skip"

    def _tell(self, moment: Moment) -> None:
        if self.watch is not None:
            self.watch(moment)

    def _prepare(self, batch: Batch) -> dict[str, Tensor]:
        return objective.prepare(batch, self._model, self.config, self.groups, self.device)

    @property
    def _tied(self) -> dict[str, str]:
        return dict(self._model.tied)

    @property
    def _model(self) -> Model:
        return self.chunks[0].model

    def _count(self, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Targets by which losses are divided, those of the whole step, and its real tokens."""
        own, tokens = objective.count(batches, self._model, self._inner)
        if self._outer is None:
            return own, own, tokens
        totals = reduce_over(self._workers, torch.stack([*own.values(), tokens]))
        return own, dict(zip(own, totals, strict=False)), totals[-1]

    def _forward_and_backward(self, batches: list[dict[str, Tensor]], counts: dict[str, Tensor]) -> Tensor:
        """Loss sums [objectives] of this rank alone: zeros but on one rank of those that compute the same loss."""

        def scaled(losses: dict[str, LossSum]) -> tuple[Tensor, Tensor]:
            loss, kept = objective.descended(losses, counts)
            return loss.mul(self.scale.value), kept

        if self._pipeline is not None:
            sums = self._run_schedule(self._pipeline, batches, scaled)
        else:
            self._settle(batches, scaled)
            with self._clock.whole():
                sums = [self._backward(b, scaled, b is batches[-1], i) for i, b in enumerate(batches)]
        total = torch.stack(sums).sum(0) if sums else torch.zeros(len(counts), device=self.device)
        total = total.to(master_dtype(self.precision))
        return total if self.groups.tensor.rank == 0 else torch.zeros_like(total)

    def _settle(self, batches: list[dict[str, Tensor]], scaled: Callable) -> None:
        """Let DDP order its buckets before the first step counts; it does so by the first backward pass that it sees.

        The order decides in which order the ranks' gradients are added. Without this the first step after a resume would
        add them in another one than the same step of an undisturbed run.
        """
        if self._settled or not batches:
            return
        traffic = self.groups.world.traffic
        before = traffic.total
        self._backward(batches[-1], scaled, last=True)
        for p in self.parameters:
            p.parameter.grad = None
        traffic.total = before
        if self._compressor is not None:
            self._compressor.forget()  # and the step itself may change residuals later, with `keep`
        self._settled = True

    def _backward(self, batch: dict[str, Tensor], scaled: Callable, last: bool, number: int = 0) -> Tensor:
        """Forward and backward of one micro-batch; whole gradients are reduced with the last one only."""
        chunk = self.chunks[0]
        data.synchronise(chunk.model, self.config.parallel.zero, last)
        with data.unsynchronised(chunk.module, last):
            with ranges.named("forward", "micro-batch", number):
                with self._clock.busy(), autocast(self.precision, self.device.type):
                    losses = chunk.module(batch, self.config.train.label_smoothing)
                loss, kept = scaled(losses)
            with ranges.named("backward", "micro-batch", number):
                loss.backward()
        return kept

    def _run_schedule(self, pipeline: Pipeline, batches: list[dict[str, Tensor]], scaled: Callable) -> list[Tensor]:
        """Forward and backward of all micro-batches by the schedule; loss sums where the last stage is."""
        sums: dict[int, Tensor] = {}

        def run(model: Model, number: int, x: Tensor | None) -> Tensor:
            with autocast(self.precision, self.device.type):
                y = model.forward_batch(batches[number], x)
                if model.head is None:
                    return y  # pyright: ignore[reportReturnType]  hidden states without a head
                losses = model.loss_of(y, batches[number], self.config.train.label_smoothing)  # pyright: ignore
            loss, sums[number] = scaled(losses)
            return loss

        pipeline.step(run)
        return list(sums.values())

    def _hidden_shape(self, sequences: int, length: int) -> tuple[int, int, int]:
        """[B, S, H] of hidden states between stages; length is that of this rank's tokens."""
        split = self.groups.tensor.size if self.config.parallel.sequence else 1
        return sequences, length // split, self.config.model.hidden_size

    def _unscale_and_clip(self, totals: Tensor) -> tuple[Tensor, bool]:
        """Global gradient norm before clipping, and whether this step must be skipped: by every rank or none. fp16 asks for
        the gradient alone, `watch.on_nonfinite=skip` for the losses' `totals` as well; others do not wait for it."""
        if self._outer is None:
            norm = own = gradients.global_norm(self.parameters, self.groups, self.device)
        else:  # each worker clips by its own
            norms = gradients.workers_norms(self.parameters, self.groups, self._workers, self.device)
            norm, own = norms.square().mean().sqrt(), norms[self._workers.rank]
        skipped = self._skips and not bool((norm if self.scale.dynamic else norm + 0 * totals.sum()).isfinite().item())
        norm, own = norm / self.scale.value, own / self.scale.value
        factor, limit = 1.0 / self.scale.value, self.config.train.clip_grad_norm
        if limit is not None:
            factor = factor * torch.clamp(limit / (own + 1e-6), max=1.0)
        if limit is not None or self.scale.dynamic:
            gradients.multiply(self.parameters, factor)
        return norm, skipped

    def _known(self, step: int) -> Known:
        """The momentum, as a part of the next one's gradient: 1-bit Adam and 1-bit LAMB send it after their warm-up. Where
        two stages sum the gradients of a weight, each takes half."""
        if self.config.compression.codec not in ONE_BIT or step <= self.config.compression.warmup_steps:
            return {}
        beta1 = self.config.optim.beta1
        twice = {*self._tied, *self._tied.values()} if self._pipeline is not None else set()
        states = {p.shard.name: self.optimizer.state.get(p.master) for p in self.parameters}
        return {name: (state["exp_avg"], beta1 / (1 - beta1) / (2 if name in twice else 1))
                for name, state in states.items() if state}  # fmt: skip

    def _update(self, step: int, learning_rate: float) -> None:
        """The optimizer on the local tensors."""
        if isinstance(self.optimizer, OneBitAdamW | OneBitLamb):
            self.optimizer.frozen = step > self.config.compression.warmup_steps
        for p in self.parameters:
            p.master.grad = p.gradient
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with pruned(self.config.pruning, self.parameters, self.groups, step):
            (self.optimizer.step if self._reduction is None else self._reduction.update)()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, LossSum]:
        """Sums over all ranks of every objective and score; see `Engine.evaluate`."""
        with looking(self.chunks, self._outer):
            scores = self._outputs(batches, scores_of)
            return objective.total_scores(scores, list(self._model.SCORES), self.groups, self.device)

    @torch.no_grad()
    def predict(self, batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
        """What the head predicts for each of this rank's batches, where it is here; see `Engine.predict`."""
        with looking(self.chunks, self._outer):
            return list(self._outputs(batches, predictions_of))

    def _outputs(self, batches: Iterable[Batch], of: Of) -> Iterable[Any]:
        prepared = (self._prepare(batch) for batch in batches)
        return outputs(self._model, self._pipeline, self.precision, self.device.type, prepared, self._hidden_shape, of)

    def traffic(self) -> Counted:
        """Bytes since the last call."""
        return self.groups.world.traffic.take()

    def bubble(self) -> tuple[float, float] | None:
        """Seconds this rank's stages computed and seconds the schedule took since the last call; None without stages."""
        return None if self._pipeline is None else self._pipeline.bubble()

    def forward_seconds(self) -> float | None:
        """Seconds of this rank's forward passes since the last call; None with stages, whose time `bubble` knows."""
        return None if self._pipeline is not None else self._clock.take()[0]

    def held(self, what: Held) -> list[tuple[sharding.Shard, Tensor]]:
        """This rank's part of every weight, of the model's copy of it, or of its (scaled) gradient. For proofs."""
        return [(p.shard, self._read(p, what)) for p in self.parameters]

    def _read(self, p: sharding.LocalParameter, what: Held) -> Tensor:
        if what == "parameter":
            return sharding.local(p.parameter).detach()
        if what == "weight":
            return p.master.detach()
        return torch.zeros_like(p.master) if p.gradient is None else p.gradient

    def kept(self) -> dict[str, list[Tensor]]:
        """The tensors that this rank holds from step to step, and gradients where there are some; see `Engine.kept`."""
        return self._state.kept()

    def state_dict(self) -> State:
        """Weights and moments by parameter name, each knowing its place in the whole, and the loss scale."""
        if self._reduction is not None:
            self._reduction.agree()
        state = self._state.tensors()
        arrives = {} if self._outer is None else {"outer_arrives": self._outer.arrives}
        return {**state, "engine": {"loss_scale": asdict(self.scale), **arrives}}

    def to_fill(self, saved: Saved) -> State:
        """What `state_dict` gives, with room for what else the checkpoint has: residuals, workers, frozen moments."""
        return self._state.to_fill(saved)

    def load_state_dict(self, state: State) -> None:
        """Take over what `to_fill` gave, filled, also where its tensors are the engine's very own."""
        self.scale = LossScale(**state["engine"]["loss_scale"])
        self._late = self._state.take(state, state["engine"].get("outer_arrives", []))

    @property
    def _state(self) -> NativeState:
        return NativeState(
            self.parameters, self.optimizer, self._compressor, self._workers, self._outer, self._tied, self.groups,
            self.device.type, self._late,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of DDP while the process group still lives; the engine cannot step after this.

        Otherwise the last reference to the group is the one DDP's reducer holds, which is dropped with the GIL held
        and then joins gloo's threads, one of which may want the GIL: a deadlock at exit, seen in one run of ten.
        """
        if self._reduction is not None:
            self._reduction.close()
        if self._outer is not None:
            self._outer.close()
        self.chunks, self.parameters, self._pipeline, self._outer = [], [], None, None
        gc.collect()
