"""A training step without numbers: every rank of a layout by itself, on fake tensors, and what the ranks would send.

Imports no torch.
"""

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import setting

OF_VALUES = ("auto", "topk", "threshold")
"""Codecs of which it depends on the gradients, or on the link, what they send."""


def refused(config: Config) -> list[Problem]:
    """Why `check --trace` cannot rehearse this config."""
    found = []
    if config.model.head != "lm":
        found.append(Problem((setting(config, "model.head"), "--trace"), "only language models can be rehearsed",
                             "rehearse the language model of the same size, or leave --trace away"))  # fmt: skip
    if config.engine != "native":
        found.append(Problem((f"engine={config.engine}", "--trace"), "only the native engine can be rehearsed",
                             "use engine=native, or leave --trace away"))  # fmt: skip
    if config.compression.codec in OF_VALUES:
        found.append(Problem((setting(config, "compression.codec"), "--trace"),
                             "what this codec sends depends on gradients, or on the link, which a rehearsal does not have",
                             "name another codec, or compression.codec=none, for the rehearsal"))  # fmt: skip
    return found
