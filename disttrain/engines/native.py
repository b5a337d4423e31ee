"""The torch-native engine: data parallelism, accumulation, clipping and loss scaling around one AdamW step."""

import gc
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from disttrain.config.schema import Config, Precision
from disttrain.engines import Batch, State, StepResult
from disttrain.models import BERT, GPT
from disttrain.models.layers import LossSum
from disttrain.optim import build_optimizer
from disttrain.parallel.collectives import Traffic, all_reduce
from disttrain.parallel.data import replicate, unsynchronised
from disttrain.precision import LossScale, autocast


class NativeEngine:
    """One optimizer step with torch alone. `precision` is resolved, never "auto"."""

    def __init__(self, config: Config, model: GPT | BERT, device: torch.device, precision: Precision, data_rank: int):
        self.model, self.device, self.data_rank = model, device, data_rank
        self.seed, self.smoothing = config.run.seed, config.train.label_smoothing
        self.max_norm = config.train.clip_grad_norm
        self.precision: Precision = precision
        self.scale = LossScale.start(precision, config.loss_scale)
        self._traffic = Traffic()
        self.module = replicate(model, device, self._traffic)
        self.optimizer = build_optimizer(config.optim, model.named_parameters())
        self._tied: dict[str, str] = model.tied
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self, micro_batches: Sequence[Batch], step: int, learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches; see `Engine.step`."""
        self.model.train()
        batches = [self._to_device(batch) for batch in micro_batches]
        counts, tokens = self._count(batches)
        sums = [self._backward(batch, counts, step, i, len(batches)) for i, batch in enumerate(batches)]
        totals = all_reduce(torch.stack([torch.stack(list(s.values())) for s in sums]).sum(0), self._traffic)
        scale = self.scale.value
        norm, skipped = self._unscale_and_clip()
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale = self.scale.after(skipped)
        losses = {name: LossSum(totals[i], counts[name]) for i, name in enumerate(counts)}
        positions = sum(batch["tokens"].size for batch in micro_batches) * dist.get_world_size()
        return StepResult(losses, tokens, positions, norm, scale, skipped)

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        """Arrays as tensors on the device; what the model derives on the host is added before the copy."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
        tensors = self.model.prepare_batch(tensors)
        if self.device.type == "cpu":
            return tensors
        return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    def _count(self, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        """Targets of each objective and real tokens of the whole step: known before any backward pass."""
        counted = [self.model.count_targets(batch) for batch in batches]
        names = list(counted[0])
        rows = [[c[name] for name in names] + [real_tokens(b)] for c, b in zip(counted, batches, strict=True)]
        totals = all_reduce(torch.stack([torch.stack(row) for row in rows]).sum(0), self._traffic)
        return {name: totals[i] for i, name in enumerate(names)}, totals[-1]

    def _backward(
        self, batch: dict[str, Tensor], counts: dict[str, Tensor], step: int, index: int, micro_steps: int
    ) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; gradients are reduced with the last one only."""
        torch.manual_seed(dropout_seed(self.seed, step, index, self.data_rank))
        last = index == micro_steps - 1
        with nullcontext() if last else unsynchronised(self.module):
            with autocast(self.precision, self.device.type):
                losses = self.module(batch, self.smoothing)
            means = [loss.sum / counts[name].clamp(min=1) for name, loss in losses.items()]
            torch.stack(means).sum().mul(self.scale.value).backward()
        return {name: loss.sum.detach() for name, loss in losses.items()}

    def _unscale_and_clip(self) -> tuple[Tensor, bool]:
        """Global gradient norm before clipping, and whether this step must be skipped by every rank."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        skipped = False
        if self.scale.dynamic:
            overflow = all_reduce((~norm.isfinite()).to(torch.int32), self._traffic, dist.ReduceOp.MAX)
            skipped = bool(overflow.item())
        norm = norm / self.scale.value
        factor = 1.0 / self.scale.value
        if self.max_norm is not None:
            factor = factor * torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)
        if self.max_norm is not None or self.scale.dynamic:
            torch._foreach_mul_(gradients, factor)
        return norm, skipped

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, LossSum]:
        """Sums over all ranks of every objective and score; see `Engine.evaluate`. Ranks may bring unequal shares."""
        self.model.eval()
        names: list[str] = list(self.model.SCORES)
        totals = torch.zeros(len(names), 2, dtype=torch.float64, device=self.device)
        for batch in batches:
            with autocast(self.precision, self.device.type):
                scores = self.model.scores(self._to_device(batch))
            totals += torch.stack([torch.stack([scores[n].sum.double(), scores[n].count.double()]) for n in names])
        all_reduce(totals)
        self.model.train()
        return {name: LossSum(totals[i, 0], totals[i, 1]) for i, name in enumerate(names)}

    def traffic(self) -> tuple[int, int]:
        """Bytes handed to collectives since the last call."""
        return self._traffic.take()

    def state_dict(self) -> State:
        """Model and optimizer by parameter name, tied weights once, and the loss scale."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        model = {name: value for name, value in model.items() if name not in self._tied}
        return {"model": model, "optimizer": optimizer, "engine": {"loss_scale": asdict(self.scale)}}

    def load_state_dict(self, state: State) -> None:
        """Take over a saved state; hyper-parameters of the optimizer stay those of the config."""
        kept: list[dict[str, Any]] = [
            {k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups
        ]
        model = state["model"] | {name: state["model"][source] for name, source in self._tied.items()}
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(values)
        self.scale = LossScale(**state["engine"]["loss_scale"])

    def close(self) -> None:
        """Let go of DDP while the process group still lives; the engine cannot step after this.

        Otherwise the last reference to the group is the one DDP's reducer holds, which is dropped with the GIL held
        and then joins gloo's threads, one of which may want the GIL: a deadlock at exit, seen in one run of ten.
        """
        del self.module
        gc.collect()


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Number of tokens that are not padding."""
    mask = batch.get("attention_mask")
    tokens = batch["tokens"]
    return tokens.new_full((), tokens.numel()) if mask is None else mask.sum()


def dropout_seed(seed: int, step: int, micro_batch: int, data_rank: int) -> int:
    """Seed of one forward pass's dropout: a pure function, so that resuming needs no random state."""
    return int(np.random.SeedSequence((seed, step, micro_batch, data_rank)).generate_state(1, np.uint64)[0] >> 1)
