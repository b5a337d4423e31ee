"""What a run reads: a corpus, or the labelled examples of a task. The one place that knows which. No torch."""

from disttrain import data
from disttrain.config.load import with_values
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.config.settings import setting
from disttrain.data import Data, Prepared
from disttrain.data.preparation import Report
from disttrain.labelled import loading
from disttrain.labelled.loading import LabelledData


def preflight(config: Config) -> list[Problem]:
    """Everything wrong with the data settings that shows without preparing."""
    return data.preflight(config) if config.task.set is None else loading.preflight(config)


def prepare(config: Config, report: Report | None = None) -> Prepared:
    """Make everything that `open_data` needs, or find it there. Raises RefusedInput."""
    return data.prepare(config, report) if config.task.set is None else loading.prepare(config, report)


def open_data(config: Config, prepared: Prepared) -> Data | LabelledData:
    """Open prepared data. Raises RefusedInput where it is gone or damaged."""
    if config.task.set is None:
        return data.open_data(config, prepared)
    return loading.open_data(config, prepared)


def with_steps(config: Config, prepared: Prepared) -> Config:
    """The config with its epochs as steps. Raises RefusedInput where these are fewer than those of the warm-up."""
    if config.train.epochs is None:
        return config
    examples = open_data(config, prepared).train_sequences
    steps = max(1, -(-round(config.train.epochs * examples) // config.train.global_batch_size))
    if config.optim.warmup_steps > steps:
        raise RefusedInput([Problem((setting(config, "optim.warmup_steps"), setting(config, "train.epochs")),
                                    f"the warm-up is longer than the run, whose {examples:,} examples make {steps:,} steps",
                                    f"use at most optim.warmup_steps={steps}")])  # fmt: skip
    return with_values(config, {"train.steps": min(steps, config.train.steps or steps)})
