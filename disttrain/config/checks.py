"""Cross-checks of a config that need neither files nor torch: which settings contradict each other, and the fix."""

from collections.abc import Iterator

from disttrain.config.compression_checks import compression_problems
from disttrain.config.layout_checks import layout_problems
from disttrain.config.optimizer_checks import optimizer_problems
from disttrain.config.outer_checks import outer_problems
from disttrain.config.problems import Problem
from disttrain.config.profile_checks import profile_problems
from disttrain.config.schema import Config
from disttrain.config.settings import given, no_effect, setting
from disttrain.config.smaller_checks import smaller_problems
from disttrain.config.task import SMALL
from disttrain.config.task_checks import task_problems
from disttrain.config.watch_checks import watch_problems

__all__ = ["given", "micro_batches", "setting", "total_steps", "validate"]


def total_steps(config: Config) -> int | None:
    """Optimizer steps of the whole run, the smaller of train.steps and train.tokens; None if neither is given. Epochs of
    labelled examples are steps by then."""
    train = config.train
    limits = [train.steps] if train.steps else []
    if train.tokens:
        limits.append(-(-train.tokens // (train.global_batch_size * config.data.sequence_length)))
    return min(limits, default=None)


def checkpoints_on_disk(config: Config) -> int:
    """How many checkpoints a run leaves at the most."""
    kept, steps = config.checkpoint, total_steps(config) or 0
    return kept.keep + kept.keep_best + (steps // kept.keep_every if kept.keep_every else 0)


def validate(config: Config, world_size: int) -> list[Problem]:
    """Every contradiction between settings, for a run on this many ranks."""
    checks = (
        _model(config),
        _batch(config, world_size),
        _length(config),
        _penalties(config),
        optimizer_problems(config),
        _loss_scale(config),
        _ignored(config),
        _kept(config),
        compression_problems(config, world_size, total_steps(config)),
        outer_problems(config),
        smaller_problems(config, total_steps(config)),
        task_problems(config),
        watch_problems(config, world_size),
        profile_problems(config, world_size, total_steps(config)),
    )
    return [*(problem for check in checks for problem in check), *layout_problems(config, world_size)]


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.family in SMALL:
        return
    if model.head_size is None and model.hidden_size % model.heads:
        fits = [h for h in range(1, model.hidden_size + 1) if model.hidden_size % h == 0]
        near = min(fits, key=lambda h: abs(h - model.heads))
        yield Problem(
            (setting(config, "model.heads"), setting(config, "model.hidden_size")),
            "the number of heads does not divide the width",
            f"use model.heads={near}, or give model.head_size",
        )
    if config.data.sequence_length > model.max_positions:
        yield Problem(
            (setting(config, "data.sequence_length"), setting(config, "model.max_positions")),
            "the sequences are longer than the model has positions",
            f"use data.sequence_length={model.max_positions} or model.max_positions={config.data.sequence_length}",
        )


def micro_batches(config: Config, world_size: int) -> int | None:
    """Micro-batches of one data rank in a step; None where ranks, batch and micro-batch do not divide evenly."""
    parallel, train = config.parallel, config.train
    data_ranks, rest = divmod(world_size, parallel.tensor * parallel.pipeline * parallel.context)
    if rest or data_ranks == 0 or train.global_batch_size % data_ranks:
        return None
    share = train.global_batch_size // data_ranks
    count, rest = divmod(share, train.micro_batch_size or share)
    return None if rest else count


def _batch(config: Config, world_size: int) -> Iterator[Problem]:
    parallel, train = config.parallel, config.train
    data_ranks, rest = divmod(world_size, parallel.tensor * parallel.pipeline * parallel.context)
    if rest or data_ranks == 0:
        return  # the layout does not fit the ranks, which is said elsewhere
    if train.global_batch_size % data_ranks:
        up = -(-train.global_batch_size // data_ranks) * data_ranks
        yield Problem(
            (setting(config, "train.global_batch_size"), f"data ranks {data_ranks}"),
            "the global batch cannot be split evenly over the data ranks",
            f"use train.global_batch_size={up}, or a number of ranks that divides {train.global_batch_size}",
        )
        return
    share = train.global_batch_size // data_ranks
    if train.micro_batch_size and share % train.micro_batch_size:
        fits = max(m for m in range(1, min(train.micro_batch_size, share) + 1) if share % m == 0)
        yield Problem(
            (setting(config, "train.micro_batch_size"), setting(config, "train.global_batch_size"),
             f"data ranks {data_ranks}"),
            f"each data rank has {share} sequences a step, which the micro-batch does not divide",
            f"use train.micro_batch_size={fits}",
        )  # fmt: skip


def _length(config: Config) -> Iterator[Problem]:
    train, steps = config.train, total_steps(config)
    if steps is None and train.epochs is None:
        yield Problem(
            ("train.steps", "train.tokens", *(("train.epochs",) if config.task.set else ())),
            "nothing says how long to train",
            "give train.steps or train.tokens (train.seconds and train.target_loss only stop earlier)",
        )
    elif steps is not None and config.optim.warmup_steps > steps:
        yield Problem(
            (setting(config, "optim.warmup_steps"), f"{steps} training steps"),
            "the warm-up is longer than the run",
            f"use at most optim.warmup_steps={steps}",
        )
    if train.patience is not None and train.eval_every == 0:
        yield no_effect(config, "train.patience", "train.eval_every", "train.eval_every=100")
    if train.target_loss is not None and train.eval_every == 0:
        yield Problem(
            (setting(config, "train.target_loss"), "train.eval_every=0"),
            "the held-out loss is only computed at the end, so the target can never stop the run",
            "give train.eval_every, for example 100",
        )


def _kept(config: Config) -> Iterator[Problem]:
    """Checkpoints that are to be kept must be written, and the best ones evaluated."""
    kept, evaluated = config.checkpoint, config.train.eval_every
    if kept.keep_every and (kept.every == 0 or kept.keep_every % kept.every):
        yield Problem(
            (setting(config, "checkpoint.keep_every"), setting(config, "checkpoint.every")),
            "no checkpoint is written at some of the steps whose checkpoints are to be kept",
            f"use checkpoint.every={kept.keep_every}, or a divisor of it",
        )
    if kept.keep_best and (kept.every == 0 or evaluated == 0 or kept.every % evaluated):
        yield Problem(
            (setting(config, "checkpoint.keep_best"), setting(config, "checkpoint.every"),
             setting(config, "train.eval_every")),
            "not every checkpoint has a held-out loss by which the best ones could be told",
            f"use train.eval_every={kept.every or 100} and checkpoint.every={kept.every or 100}",
        )  # fmt: skip


def _loss_scale(config: Config) -> Iterator[Problem]:
    scale = config.loss_scale
    if scale.minimum > scale.initial:
        yield Problem(
            (setting(config, "loss_scale.initial"), setting(config, "loss_scale.minimum")),
            "the first loss scale is below the smallest one",
            f"use loss_scale.minimum={scale.initial} or less",
        )
    scaling = [key for key in type(scale).model_fields if given(config, f"loss_scale.{key}")]
    if scaling and config.precision != "fp16":
        yield Problem(
            (*(setting(config, f"loss_scale.{key}") for key in scaling), f"precision={config.precision}"),
            "only fp16 scales its loss, so these settings have no effect",
            "remove loss_scale or use precision=fp16",
        )  # fmt: skip


def _penalties(config: Config) -> Iterator[Problem]:
    for key in ("train.l1_penalty", "train.l2_penalty"):
        if given(config, key) and config.engine == "deepspeed":
            yield Problem(
                ("engine=deepspeed", setting(config, key)),
                "DeepSpeed completes and clips the gradients by itself, so nothing can be added in between",
                "use engine=native or horovod" + (", or optim.weight_decay" if key.endswith("l2_penalty") else ""),
            )


def _ignored(config: Config) -> Iterator[Problem]:
    for key in (f"log.{name}" for name in type(config.log).model_fields if name.startswith("wandb_")):
        if given(config, key) and not config.log.wandb:
            yield no_effect(config, key, "log.wandb", "log.wandb=true")
