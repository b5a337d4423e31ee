"""Checks of the optimizer: settings that another one reads, and schedules without what defines them. No torch."""

from collections.abc import Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import given, no_effect, setting

MOMENTS = ("adamw", "lamb", "adam", "radam", "muon")
READ_BY: dict[str, tuple[str, ...]] = {
    "beta1": MOMENTS,
    "beta2": MOMENTS,
    "epsilon": (*MOMENTS, "adagrad", "rmsprop", "adafactor"),
    "momentum": ("sgd", "rmsprop", "muon"),
    "nesterov": ("sgd", "muon"),
    "alpha": ("rmsprop",),
    "centered": ("rmsprop",),
    "ns_steps": ("muon",),
    "implementation": ("adamw", "adam"),
}
"""Settings that only some optimizers read."""


def optimizer_problems(config: Config) -> Iterator[Problem]:
    """Every contradiction of `optim`."""
    optim = config.optim
    for name, readers in READ_BY.items():
        if given(config, f"optim.{name}") and optim.name not in readers:
            yield no_effect(config, f"optim.{name}", "optim.name", f"optim.name={' or '.join(readers)}")
    if optim.name == "sgd" and optim.looks_ahead and optim.running == 0:
        yield Problem(("optim.nesterov=true", setting(config, "optim.momentum")),
                      "Nesterov's step looks ahead along the momentum, and there is none",
                      "give optim.momentum, for example 0.9, or remove optim.nesterov")  # fmt: skip
    if optim.schedule == "inverse_sqrt" and optim.warmup_steps == 0:
        yield Problem(
            ("optim.schedule=inverse_sqrt", "optim.warmup_steps=0"),
            "the inverse square root schedule is defined by its warm-up",
            "give optim.warmup_steps, for example 100",
        )
    if given(config, "optim.decay_fraction") and optim.schedule != "wsd":
        yield no_effect(config, "optim.decay_fraction", "optim.schedule", "optim.schedule=wsd")
    if given(config, "optim.min_lr_ratio") and optim.schedule in ("constant", "inverse_sqrt"):
        yield no_effect(config, "optim.min_lr_ratio", "optim.schedule", "optim.schedule=cosine, linear or wsd")
