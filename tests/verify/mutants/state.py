"""Faults of norm, clipping, loss scale, optimizer, evaluation and checkpoints."""

from dataclasses import replace as with_values
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain import checkpoint
from disttrain.engines import native, objective
from disttrain.engines.native import NativeEngine
from disttrain.models import GPT
from disttrain.parallel import gradients
from disttrain.precision import LossScale
from tests.verify.mutants.mutant import Mutant, after, gradients_of, needs, replace


def copies_in_the_norm() -> None:
    def make(norm: Any) -> Any:
        def changed(parameters: Any, groups: Any, device: Any) -> Tensor:
            return norm([with_values(p, share=torch.ones_like(p.share)) for p in parameters], groups, device)

        return changed

    replace(gradients, "global_norm", make)


def local_norm(parameters: Any) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradients_of(parameters)]).sum().sqrt()


def norm_of_the_shard() -> None:
    gradients.global_norm = lambda parameters, groups, device: local_norm(parameters)


def clip_by_local_norm() -> None:
    """The reported norm is right, the clip factor is that of the rank's own shards."""

    def make(clip: Any) -> Any:
        def changed(self: NativeEngine, totals: Tensor) -> tuple[Tensor, bool]:
            own, limit = local_norm(self.parameters) / self.scale.value, self.config.train.clip_grad_norm or 1.0
            norm, skipped = clip(self, totals)
            if not skipped:
                wrong = torch.clamp(limit / (own + 1e-6), max=1.0) / torch.clamp(limit / (norm + 1e-6), max=1.0)
                gradients.multiply(self.parameters, wrong)
            return norm, skipped

        return changed

    replace(NativeEngine, "_unscale_and_clip", make)


def clip_before_unscaling() -> None:
    def make(clip: Any) -> Any:
        def changed(self: NativeEngine, totals: Tensor) -> tuple[Tensor, bool]:
            norm, skipped = clip(self, totals)
            limit = self.config.train.clip_grad_norm or 1.0
            if not skipped:
                factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
                wrong = torch.clamp(limit / (norm * self.scale.value + 1e-6), max=1.0) * self.scale.value
                gradients.multiply(self.parameters, wrong / factor)
            return norm, skipped

        return changed

    replace(NativeEngine, "_unscale_and_clip", make)


def one_rank_skips_alone() -> None:
    def make(clip: Any) -> Any:
        def changed(self: NativeEngine, totals: Tensor) -> tuple[Tensor, bool]:
            overflow = not bool(local_norm(self.parameters).isfinite())
            norm, _ = clip(self, totals)
            return norm, overflow

        return changed

    replace(NativeEngine, "_unscale_and_clip", make)


def scale_not_halved() -> None:
    def make(rule: Any) -> Any:
        return lambda self, overflow: with_values(self, good_steps=0) if overflow else rule(self, overflow)

    replace(LossScale, "after", make)


def skipped_step_decays() -> None:
    """A skipped step still calls the optimizer, with gradients of zero."""

    def make(clip: Any) -> Any:
        def changed(self: NativeEngine, totals: Tensor) -> tuple[Tensor, bool]:
            norm, skipped = clip(self, totals)
            if skipped:
                for gradient in gradients_of(self.parameters):
                    gradient.zero_()
                self._update(1, 1e-2)
            return norm, skipped

        return changed

    replace(NativeEngine, "_unscale_and_clip", make)


def skipped_step_counts() -> None:
    """A skipped step advances the bias correction."""

    def make(clip: Any) -> Any:
        def changed(self: NativeEngine, totals: Tensor) -> tuple[Tensor, bool]:
            norm, skipped = clip(self, totals)
            for state in self.optimizer.state.values() if skipped else []:
                state["step"] += 1
            return norm, skipped

        return changed

    replace(NativeEngine, "_unscale_and_clip", make)


def skipped_gradients_stay() -> None:
    """The gradients of a skipped step are not cleared: the next ones are added to them."""

    def keep(result: Any, self: NativeEngine, *step: Any) -> Any:
        for p in self.parameters if result.skipped else []:
            p.parameter.grad = torch.ones_like(p.parameter)
        return result

    after(NativeEngine, "step", keep)


def saving_changes_moments() -> None:
    def forget(path: Any, folder: Any, step: Any, tensors: Any, *rest: Any, **keep: Any) -> Any:
        for moments in tensors["optimizer"].values():
            moments["exp_avg"].zero_()
        return path

    after(checkpoint, "save", forget)


def norms_decay_under_zero() -> None:
    """Weight decay is decided by the shape of the flat shard, in worlds of several ranks."""

    def make(build: Any) -> Any:
        def changed(config: Any, named: Any, *more: Any) -> Any:
            optimizer = build(config, named, *more)
            if dist.get_world_size() > 1:
                for group in optimizer.param_groups:
                    group["weight_decay"] = config.weight_decay
            return optimizer

        return changed

    replace(native, "build_optimizer", make)


def evaluates_in_training_mode() -> None:
    nn.Module.eval = lambda self: self.train()


def evaluation_not_summed() -> None:
    def make(reduce: Any) -> Any:
        return lambda group, tensor, *args: tensor if tensor.ndim == 2 else reduce(group, tensor, *args)

    replace(objective, "reduce_over", make)


def smoothed_evaluation() -> None:
    GPT.scores_of = lambda self, output, batch: self.loss_of(output, batch, 0.1)


def scaler_lost() -> None:
    def reset(nothing: None, self: NativeEngine, state: Any) -> None:
        self.scale = LossScale(1024.0, 2, 1.0)

    after(NativeEngine, "load_state_dict", reset)


def moments_lost() -> None:
    def forget(nothing: None, self: NativeEngine, state: Any) -> None:
        self.optimizer.state.clear()

    after(NativeEngine, "load_state_dict", forget)


def step_count_lost() -> None:
    def forget(nothing: None, self: NativeEngine, state: Any) -> None:
        for moments in self.optimizer.state.values():
            moments["step"] = torch.zeros_like(moments["step"])

    after(NativeEngine, "load_state_dict", forget)


def one_weight_not_loaded() -> None:
    """Parameters that a wrapper renamed are skipped in silence (strict=False)."""

    def make(load: Any) -> Any:
        def changed(path: Any, tensors: Any) -> Any:
            kept = tensors["model"]["head.norm.weight"].clone()
            trainer = load(path, tensors)
            tensors["model"]["head.norm.weight"].copy_(kept)
            return trainer

        return changed

    replace(checkpoint, "load", make)


def moments_of_another_layout_dropped() -> None:
    """The optimizer's state is taken over only when the checkpoint is of the same layout."""

    def make(load: Any) -> Any:
        def changed(path: Any, tensors: Any) -> Any:
            trainer = load(path, tensors)
            if not path.parent.name.startswith("layout"):
                for moments in tensors["optimizer"].values():
                    for value in moments.values():
                        value.zero_()
            return trainer

        return changed

    replace(checkpoint, "load", make)


def after_loading_of_another_layout(then: Any) -> None:
    """Let ``then(engine)`` change an engine that has loaded the checkpoint of another layout."""
    loaded: list[Any] = []
    after(checkpoint, "load", lambda trainer, path, tensors: loaded.append(path) or trainer)

    def change(nothing: None, self: NativeEngine, state: Any) -> None:
        if not loaded[-1].parent.name.startswith("layout"):
            then(self)

    after(NativeEngine, "load_state_dict", change)


def step_count_of_another_layout_dropped() -> None:
    def forget(engine: NativeEngine) -> None:
        for moments in engine.optimizer.state.values():
            moments["step"] = torch.zeros_like(moments["step"])

    after_loading_of_another_layout(forget)


def scaler_of_another_layout_dropped() -> None:
    def reset(engine: NativeEngine) -> None:
        engine.scale = with_values(engine.scale, good_steps=0)

    after_loading_of_another_layout(reset)


def moments_of_another_layout_exchanged() -> None:
    """Two shards of the second moment are exchanged between the ranks that hold them."""

    def exchange(engine: NativeEngine) -> None:
        group = engine.groups.tensor
        for p in engine.parameters:
            if p.shard.tensor_cut and p.shard.name.startswith("blocks."):
                own = engine.optimizer.state[p.master]["exp_avg_sq"]
                shards = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(group.size)]
                dist.all_gather(shards, own.contiguous(), group=group.process_group)
                own.copy_(shards[group.rank - 1])

    after_loading_of_another_layout(exchange)


def layers_of_another_layout_shuffled() -> None:
    """Layers are numbered anew when the checkpoint had another number of stages."""

    def make(load: Any) -> Any:
        def changed(path: Any, tensors: Any) -> Any:
            trainer = load(path, tensors)
            if not path.parent.name.startswith("layout"):
                model = tensors["model"]
                for name in [n for n in model if n.startswith("blocks.1.") and n.replace(".1.", ".0.", 1) in model]:
                    other = name.replace(".1.", ".0.", 1)
                    first, second = model[name].clone(), model[other].clone()
                    model[name].copy_(second)
                    model[other].copy_(first)
            return trainer

        return changed

    replace(checkpoint, "load", make)


def layers_saved_by_place() -> None:
    """A stage saves its layers under their numbers within the stage; it loads them in the same way."""

    def renamed(name: str, self: NativeEngine) -> str:
        here = sorted({int(p.shard.name.split(".")[1]) for p in self.parameters if p.shard.name.startswith("blocks.")})
        if not name.startswith("blocks.") or self.groups.pipeline.size == 1:
            return name
        number = int(name.split(".")[1])
        return name.replace(f".{number}.", f".{here[len(here) - 1 - here.index(number)]}.", 1)

    def saved(state: Any, self: NativeEngine) -> Any:
        return state | {kind: {renamed(n, self): v for n, v in state[kind].items()} for kind in ("model", "optimizer")}

    def make(load: Any) -> Any:
        def changed(self: NativeEngine, state: Any) -> None:
            back = {kind: {renamed(n, self): v for n, v in state[kind].items()} for kind in ("model", "optimizer")}
            load(self, {**state, **back})

        return changed

    after(NativeEngine, "state_dict", saved)
    replace(NativeEngine, "load_state_dict", make)


def stale_moments_saved() -> None:
    """The last rank saves its optimizer shard as it was before the last step."""

    def stale(state: Any, self: NativeEngine) -> Any:
        if self.groups.world.rank and self.config.parallel.zero:
            state["optimizer"] = {
                name: {k: v if v.ndim == 0 else v * 0.5 for k, v in moments.items()}
                for name, moments in state["optimizer"].items()
            }
        return state

    after(NativeEngine, "state_dict", stale)


STATE = [
    Mutant("copies_in_the_norm", "replicated parameters count once for each rank in the gradient norm", "tp2 on 2",
           copies_in_the_norm, "grad_norm", "copies of a parameter count more than once", needs("tensor")),
    Mutant("norm_of_the_shard", "the gradient norm is that of the rank's own shards", "dp2.zero2 on 2",
           norm_of_the_shard, "grad_norm", "a part of the parameters", needs("data", "zero")),
    Mutant("norm_of_the_stage", "each pipeline stage clips by its own norm (DeepSpeed at stage 0)",
           "pp2-1f1b.mb4 on 2", norm_of_the_shard, "grad_norm", "a part of the parameters", needs("pipeline")),
    Mutant("clip_by_local_norm", "the norm is reported globally, but clipping uses the local one", "tp2.dp2 on 4",
           clip_by_local_norm, "clip", "another norm than the global one", needs("tensor")),
    Mutant("clip_before_unscaling", "gradients are clipped while still multiplied by the loss scale", "dp2 on 2",
           clip_before_unscaling, "clip", "not unscaled by the same factor", needs()),
    Mutant("one_rank_skips_alone", "one rank sees the overflow and skips, the others update", "pp2-1f1b.mb4 on 2",
           one_rank_skips_alone, "skip", "reduced over the whole mesh", needs("pipeline")),
    Mutant("scale_not_halved", "the loss scale stays where it is after an overflow", "dp2 on 2", scale_not_halved,
           "skip", "loss scale does not follow its rule", needs()),
    Mutant("skipped_step_decays", "a skipped step still applies momentum and weight decay", "mb4 on 1",
           skipped_step_decays, "weights", "a skipped step changed weights", needs()),
    Mutant("skipped_step_counts", "a skipped step advances Adam's bias correction", "dp2 on 2", skipped_step_counts,
           "weights", "a skipped step changed the optimizer's state", needs()),
    Mutant("skipped_gradients_stay", "the gradients of a skipped step are added to those of the next", "mb4 on 1",
           skipped_gradients_stay, "gradients", "loses or repeats a contribution", needs()),
    Mutant("saving_changes_moments", "a run that saves goes on in another way than one that does not", "dp2 on 2",
           saving_changes_moments, "weights", "or evaluation or saving did", needs()),
    Mutant("norms_decay_under_zero", "weight decay also falls on norms and biases when parameters are sharded",
           "dp2.zero2 on 2", norms_decay_under_zero, "weights", "weight decay groups", needs("data")),
    Mutant("evaluates_in_training_mode", "evaluation runs with dropout", "tp2 on 2", evaluates_in_training_mode,
           "evaluation", "training mode", needs("dropout")),
    Mutant("evaluation_not_summed", "each rank reports the evaluation loss of its own share", "dp2 on 2",
           evaluation_not_summed, "evaluation", "not added over the ranks", needs("data")),
    Mutant("smoothed_evaluation", "label smoothing is on while evaluating", "dp2 on 2", smoothed_evaluation,
           "evaluation", "evaluation", needs()),
    Mutant("scaler_lost", "the loss scaler starts anew on resume", "dp2 on 2", scaler_lost, "resume",
           "loss scaler is lost", needs()),
    Mutant("moments_lost", "optimizer state is not restored on resume", "tp2 on 2", moments_lost, "resume",
           "optimizer's state is not restored", needs()),
    Mutant("step_count_lost", "Adam's step count starts from zero after a resume", "mb4 on 1", step_count_lost,
           "resume", "optimizer's state is not restored", needs()),
    Mutant("one_weight_not_loaded", "a renamed parameter keeps its initial value (strict=False)", "tp2 on 2",
           one_weight_not_loaded, "resume", "weights are not restored", needs()),
    Mutant("moments_of_another_layout_dropped", "another world size resumes without optimizer state", "dp2 on 2",
           moments_of_another_layout_dropped, "reshard", "optimizer's state is not taken over", needs()),
    Mutant("step_count_of_another_layout_dropped", "Adam's step count starts from zero in another world size", "dp2 on 2",
           step_count_of_another_layout_dropped, "reshard", "optimizer's state is not taken over", needs()),
    Mutant("scaler_of_another_layout_dropped", "another world size starts counting good steps anew", "dp2 on 2",
           scaler_of_another_layout_dropped, "reshard", "loss scaler is not taken over", needs()),
    Mutant("moments_of_another_layout_exchanged", "optimizer shards go to other ranks in another world size",
           "tp2 on 2", moments_of_another_layout_exchanged, "reshard", "optimizer's state is not taken over",
           needs("tensor")),
    Mutant("layers_of_another_layout_shuffled", "layers are in another order after loading at another pipeline size",
           "pp2-1f1b.mb4 on 2", layers_of_another_layout_shuffled, "reshard", "layers in another order",
           needs()),
    Mutant("layers_saved_by_place", "a stage saves its layers under numbers that another pipeline size reads wrongly",
           "pp2-1f1b.mb4 on 2", layers_saved_by_place, "checkpoint", "under other numbers", needs("pipeline")),
    Mutant("stale_moments_saved", "a rank saves a stale optimizer shard", "dp2.zero1 on 2", stale_moments_saved,
           "checkpoint", "stale", needs("data", "zero")),
]  # fmt: skip
