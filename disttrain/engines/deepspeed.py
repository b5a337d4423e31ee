"""DeepSpeed as an engine: ZeRO 0 to 3 with its own reduction, loss scale, clipping and update (Rasley et al. 2020).

DeepSpeed averages gradients over its ranks; ours are sums (`objective.descended`), so the loss is multiplied by the number
of ranks and never divided by that of micro-batches.
"""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from disttrain import ranges
from disttrain.config.load import with_values
from disttrain.config.schema import Config, Precision
from disttrain.deepspeed_config import translate
from disttrain.engines import Batch, Held, Moment, Saved, State, StepResult, deepspeed_state, objective
from disttrain.engines.deepspeed_traffic import count_traffic
from disttrain.engines.looking import predictions_of
from disttrain.models import Model
from disttrain.models.layers import LossSum
from disttrain.optim import build_optimizer
from disttrain.parallel import sharding
from disttrain.parallel.collectives import Counted, reduce_over
from disttrain.parallel.groups import Groups
from disttrain.parallel.parallelize import parallelize
from disttrain.precision import LossScale, autocast


class Computing(nn.Module):
    """A model whose forward is its loss sums, or its scores: what DeepSpeed wraps."""

    def __init__(self, model: Model, precision: Precision, device_type: str):
        super().__init__()
        self.model, self._device_type = model, device_type
        self._precision: Precision = precision

    def forward(self, batch: dict[str, Tensor], label_smoothing: float | None, predict: bool = False) -> Any:
        """Loss sums of one micro-batch; its scores where label_smoothing is None, or what a task's model predicts."""
        with autocast(self._precision, self._device_type):
            if predict:
                return predictions_of(self.model, self.model.forward_batch(batch), batch)
            if label_smoothing is None:
                return self.model.scores(batch)
            return self.model.loss(batch, label_smoothing)


class DeepSpeedEngine:
    """One optimizer step by DeepSpeed. `precision` is resolved, never "auto". All ranks make theirs together."""

    def __init__(self, config: Config, groups: Groups, device: torch.device, precision: Precision):
        self.config, self.groups, self.device = config, groups, device
        self.precision: Precision = precision
        self.watch: Callable[[Moment], None] | None = None
        whole = with_values(config, {"parallel.zero": 0, "parallel.offload": False})
        (chunk,) = parallelize(whole, groups, device, precision, replicated=False)
        self.model = chunk.model
        self.parameters = [(p.shard, p.parameter) for p in chunk.parameters]
        self.engine = self._initialize()
        self._grow_in_time()

    def _initialize(self) -> Any:
        deepspeed = quiet_deepspeed(self.device.type)
        named = [(shard.name, parameter) for shard, parameter in self.parameters]
        optimizer = build_optimizer(self.config.optim, named)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # some stages take a step to allocate the optimizer's state
        resolved = with_values(self.config, {"precision": self.precision, "run.device": self.device.type})
        settings = translate(resolved, self.groups.world.size)
        os.environ.setdefault(
            "LOCAL_RANK", str(self.device.index or 0)
        )  # which DeepSpeed asks for even with a group at hand
        module = Computing(self.model, self.precision, self.device.type)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        deepspeed_state.allocate(engine)
        count_traffic(self.groups.world.traffic)
        return engine

    @property
    def scale(self) -> LossScale:
        """The state of DeepSpeed's own scaler; a constant 1 unless the precision is fp16."""
        scaler = self._scaler
        if scaler is None:
            return LossScale(1.0, 0, 1.0)
        good = (scaler.cur_iter - 2 - scaler.last_overflow_iter) % scaler.scale_window
        return LossScale(float(scaler.cur_scale), scaler.scale_window, float(scaler.min_scale), good)

    @property
    def _scaler(self) -> Any:
        return self.engine.optimizer.loss_scaler if self.precision == "fp16" else None

    def _grow_in_time(self) -> None:
        """Let DeepSpeed's scaler, which doubles one good step too late, believe that the last overflow was one earlier."""
        if self._scaler is not None:
            self._scaler.last_overflow_iter -= 1

    def step(self, micro_batches: Sequence[Batch], step: int, learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches; see `Engine.step`."""
        self.engine.train()
        batches = [objective.prepare(b, self.model, self.config, self.groups, self.device) for b in micro_batches]
        counts, tokens = objective.count(batches, self.model, self.groups.data)
        sums = torch.stack([self._backward(b, counts, last=b is batches[-1]) for b in batches]).sum(0)
        totals = reduce_over(self.groups.world, sums.float())
        self._tell("reduced")
        before, skips = self.scale, self.engine.skipped_steps
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._norm() if self.config.parallel.zero == 0 else None
        self._update()
        skipped = self.engine.skipped_steps > skips
        if skipped:
            self._grow_in_time()
        self._tell("updated")
        if norm is None:
            found = float("inf") if skipped else self.engine.get_global_grad_norm()
            norm = torch.as_tensor(found, dtype=torch.float32, device=self.device)
        losses = {name: LossSum(totals[i], counts[name]) for i, name in enumerate(counts)}
        positions = sum(batch["tokens"].size for batch in micro_batches) * self.groups.mesh.data_ranks
        return StepResult(losses, tokens, positions, norm, before.value, skipped)

    def _backward(self, batch: dict[str, Tensor], counts: dict[str, Tensor], last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        with ranges.named("forward"):
            loss, sums = objective.descended(self.engine(batch, self.config.train.label_smoothing), counts)
        with ranges.named("backward"):
            self.engine.backward(loss * self.groups.world.size, scale_wrt_gas=False)
        return sums

    def _norm(self) -> Tensor:
        """2-norm of the whole gradient before clipping, which stage 0 does not tell: whole gradients are on every rank."""
        norms = torch._foreach_norm([p.grad for _, p in self.parameters if p.grad is not None])
        return torch.stack(norms).double().square().sum().sqrt().float()

    def _update(self) -> None:
        """Unscale, clip, step. Raises FloatingPointError for an overflow at the smallest loss scale."""
        try:
            self.engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise FloatingPointError(
                f"gradients overflow fp16 even at the smallest loss scale, {self.scale.value:g}: the model diverged; "
                "lower optim.lr, or use precision=bf16"
            ) from error

    def _tell(self, moment: Moment) -> None:
        if self.watch is not None:
            self.watch(moment)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, LossSum]:
        """Sums over all ranks of every objective and score; see `Engine.evaluate`."""
        self.engine.eval()
        prepared = (objective.prepare(b, self.model, self.config, self.groups, self.device) for b in batches)
        scores = (self.engine.module(batch, None) for batch in prepared)
        totals = objective.total_scores(scores, list(self.model.SCORES), self.groups, self.device)
        self.engine.train()
        return totals

    @torch.no_grad()
    def predict(self, batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
        """What the head predicts for each of this rank's batches; see `Engine.predict`."""
        self.engine.eval()
        prepared = (objective.prepare(b, self.model, self.config, self.groups, self.device) for b in batches)
        found = [self.engine.module(batch, None, predict=True) for batch in prepared]
        self.engine.train()
        return found

    def traffic(self) -> Counted:
        """Bytes since the last call, those of DeepSpeed's own collectives included."""
        return self.groups.world.traffic.take()

    def bubble(self) -> None:
        """There is no pipeline."""

    def forward_seconds(self) -> None:
        """DeepSpeed's are not measured."""

    def kept(self) -> dict[str, list[Tensor]]:
        """The model's weights, and what DeepSpeed's optimizer holds: master weights, where it has some, and moments."""
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        held = [p.data for group in inner.param_groups for p in group["params"]]
        held += [x for state in inner.state.values() for x in state.values() if isinstance(x, Tensor)]
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        return {"weights": [p.data for _, p in self.parameters], "optimizer": held, "gradients": gradients}

    def held(self, what: Held) -> list[tuple[sharding.Shard, Tensor]]:
        """Every whole weight, the model's copy of it, or (scaled, summed) gradient. All ranks call it."""
        if what == "gradient":
            found = [(shard, deepspeed_state.gradient(self.engine, p)) for shard, p in self.parameters]
            return [(s, torch.zeros(s.shape) if g is None else g.float()) for s, g in found]
        read = deepspeed_state.weight if what == "weight" else deepspeed_state.working_copy
        return [(shard, read(self.engine, p).float()) for shard, p in self.parameters]

    def state_dict(self) -> State:
        """Whole weights and moments by name, as the native engine saves them, and the loss scale. All ranks call it."""
        model, moments = {}, {}
        for shard, parameter in self.parameters:
            model[shard.name] = deepspeed_state.weight(self.engine, parameter)
            moments[shard.name] = deepspeed_state.moments(self.engine, parameter)
        return {"model": model, "optimizer": moments, "engine": {"loss_scale": asdict(self.scale)}}

    def to_fill(self, saved: Saved) -> State:
        """What `state_dict` gives."""
        return {key: value for key, value in self.state_dict().items() if key != "engine"}

    def load_state_dict(self, state: State) -> None:
        """Take over a saved state, of this engine or another one. All ranks call it."""
        for shard, parameter in self.parameters:
            saved = state["optimizer"][shard.name]
            deepspeed_state.put(self.engine, parameter, state["model"][shard.name], saved)
        scaler, scale = self._scaler, LossScale(**state["engine"]["loss_scale"])
        if scaler is not None and scale.dynamic:
            scaler.cur_scale = scale.value
            scaler.last_overflow_iter = scaler.cur_iter - 2 - scale.good_steps

    def close(self) -> None:
        """Let go of the engine while the process group still lives."""
        self.engine.destroy()
        del self.engine, self.model, self.parameters
        gc.collect()


def quiet_deepspeed(device_type: str) -> Any:
    """The deepspeed module, which then only warns; it uses the process group that is there and compiles nothing."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says on every rank that it found no GPU
    warnings.filterwarnings(
        "ignore", "`torch.distributed.*is deprecated", FutureWarning
    )  # names of torch's that it uses
    with _no_linker_errors():
        deepspeed: Any = import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # An operator for inference on one host, which it would compile for half a minute, or die without g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.accelerator.get_accelerator()
    if (
        accelerator.device_name() == "cpu"
    ):  # it refuses fp16 where the CPU lacks AVX-512; torch computes it all the same
        accelerator.is_fp16_supported = lambda: True
    return deepspeed


@contextmanager
def _no_linker_errors() -> Iterator[None]:
    """Keep what DeepSpeed's import tries out with the compiler from the terminal."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
