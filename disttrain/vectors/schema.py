"""The file that `disttrain vectors` reads. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.section import Positive, Section
from disttrain.config.standalone import load_section, without_effect

REFERENCE = "docs/vectors.md"
OF_WORD2VEC = ("objective", "negatives", "noise_power", "subsample")
"""Settings that GloVe does not read."""
OF_GLOVE = ("x_max", "alpha")
"""Settings that only GloVe reads."""
OF_NEGATIVE_SAMPLING = ("negatives", "noise_power")

LEARNING_RATE = {"skipgram": 0.025, "cbow": 0.05, "glove": 0.05}
"""First learning rate where none is given: those of the authors' programs."""
BATCH = {"skipgram": 256, "cbow": 256, "glove": 8192}
"""Words (skipgram, cbow) or pairs of words (glove) of one update where it is not given."""


class VectorsConfig(Section):
    """How word vectors are trained."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "vectors"
    """Name of the folder; the config file's stem when not given."""
    dir: str = "runs"
    """Folder that holds the folder."""
    path: str | list[str]
    """Text: files, folders or globs. Words are what white space separates; windows do not cross lines."""
    lowercase: bool = False
    """Lower-case the text."""
    unknown: str | None = None
    """A word of the text that stands for unknown ones, such as <unk>; it is left out as rare words are."""
    min_count: Positive = 5
    """Words that occur less often are left out of the text, before windows are laid."""
    method: Literal["skipgram", "cbow", "glove"] = "skipgram"
    """skipgram predicts a word's neighbours, cbow the word from its neighbours (Mikolov et al. 2013); glove fits the
    logarithm of how often two words meet (Pennington et al. 2014)."""
    size: Annotated[int, Field(gt=0, le=4096)] = 100
    """Elements of a vector."""
    window: Annotated[int, Field(gt=0, le=1000)] = 5
    """Words on either side that count as neighbours, at most: word2vec draws 1 to window anew for each word, glove weighs a
    neighbour at distance d by 1 / d."""
    objective: Literal["negative_sampling", "hierarchical_softmax"] = "negative_sampling"
    """What replaces word2vec's softmax over the vocabulary."""
    negatives: Annotated[int, Field(gt=0, le=1000)] = 5
    """Noise words a prediction of negative sampling."""
    noise_power: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Noise words are drawn in proportion to their counts to this power."""
    subsample: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """word2vec keeps a word of relative frequency f with probability sqrt(subsample / f), drawn anew in each epoch; 0 keeps
    all."""
    x_max: Annotated[float, Field(gt=0)] = 100.0
    """glove weighs a pair that meets x times by min(1, (x / x_max) ^ alpha)."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.75
    """The power in that weight."""
    epochs: Positive = 5
    """Passes over the text (word2vec) or over all pairs that meet (glove)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """First learning rate: 0.025 for skipgram, 0.05 for cbow and glove, when not given. word2vec lets it fall linearly to
    nearly zero; glove's AdaGrad keeps it."""
    batch: Positive | None = None
    """Words of the text (word2vec; 256 when not given) or pairs (glove; 8192) of one update, whose gradients are summed."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1
    """Seed of the first vectors, the order, the windows, the subsampling and the noise words."""
    questions: str | None = None
    """Analogy questions to answer at the end, a file in the format of word2vec's questions-words.txt."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the folder's last state; never trains anew and replaces what the folder holds."""

    @property
    def first_lr(self) -> float:
        """The first learning rate."""
        return LEARNING_RATE[self.method] if self.lr is None else self.lr

    @property
    def batch_size(self) -> int:
        """Words or pairs of one update."""
        return BATCH[self.method] if self.batch is None else self.batch

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.dir).expanduser() / self.name


def load_vectors(path: Path, overrides: Sequence[str]) -> VectorsConfig:
    """Read a config. Raises RefusedInput with every problem, settings without effect among them."""
    config = load_section(VectorsConfig, path, overrides, REFERENCE)
    if problems := _without_effect(config):
        raise RefusedInput(problems)
    return config


def _without_effect(config: VectorsConfig) -> list[Problem]:
    method = f"method={config.method}"
    if config.method == "glove":
        return without_effect(config, OF_WORD2VEC, method, "use method=skipgram or method=cbow")
    problems = without_effect(config, OF_GLOVE, method, "use method=glove")
    if config.objective == "hierarchical_softmax":
        because = "objective=hierarchical_softmax"
        problems += without_effect(config, OF_NEGATIVE_SAMPLING, because, "use objective=negative_sampling")
    return problems
