"""Settings of tasks beside language modelling: heads, small encoders and labelled examples (docs/tasks.md)."""

from typing import Annotated, Literal

from pydantic import Field

from disttrain.config.section import Fraction, NonNegative, Positive, Section

Head = Literal["lm", "classify", "regress", "tag", "answer"]
SMALL = ("text_cnn", "rnn")
"""Families of the papers' baselines: they need no attention heads, and take data parallelism and ZeRO only."""


class HeadConfig(Section):
    """What the model predicts, and by which loss."""

    head: Head = "lm"
    """lm: language modelling. classify, regress: one label or number a sequence. tag: one label a word. answer: where the
    answer stands in the text. It follows from task.set where that is given."""
    labels: Positive | None = None
    """Classes, or kinds of tags; those of task.set when not given."""
    loss: Literal["cross_entropy", "focal", "ghm"] = "cross_entropy"
    """Of classes and tags: cross-entropy, focal loss (Lin et al. 2017) or GHM-C (Li et al. 2019)."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """How much less focal loss looks at what is known well."""
    focal_alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """Weight of every class but the first in focal loss, whose own is 1 - alpha; all weigh 1 when not given."""
    ghm_bins: Positive = 10
    """Regions of gradient length whose density GHM-C counts."""
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teachers' soft labels in the loss, the rest is that of the true ones (distill.teachers)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """What logits are divided by before soft labels are compared (Hinton et al. 2015)."""
    crf: bool = False
    """Tags depend on their neighbours: a linear-chain conditional random field (Lafferty et al. 2001) on top."""
    top_attention_heads: NonNegative = 0
    """Heads of a self-attention layer between encoder and head, with a residual connection; 0 for none."""


class EncoderConfig(Section):
    """Shapes of text_cnn and rnn; hidden_size is the width of their word vectors unless embedding_size is given."""

    embedding_size: Positive | None = None
    """Width of the word vectors; hidden_size when not given."""
    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    """Cell of family rnn, hidden_size wide in each direction."""
    bidirectional: bool = True
    """Read from both ends (rnn)."""
    kernels: Annotated[list[Positive], Field(min_length=1)] = [3, 4, 5]
    """Words that the filters of text_cnn see (Kim 2014)."""
    channels: Positive = 128
    """Filters of each width (text_cnn)."""
    character_size: NonNegative = 0
    """Width of character vectors, from which a convolution makes a second word vector (Ma and Hovy 2016); 0 for none."""
    character_channels: Positive = 30
    """Filters over characters, each 3 of them wide."""
    embedding_dropout: Fraction = 0.0
    """Probability that a word of the vocabulary is dropped from a sequence (Gal and Ghahramani 2016)."""


class TaskConfig(Section):
    """Labelled examples, and what is made of them."""

    set: str | None = None
    """Name of a set of labelled examples, in place of data.corpus (docs/tasks.md); null trains a language model."""
    path: str | None = None
    """Folder with its official files."""
    source: Literal["files", "hub"] = "files"
    """files: the official ones in a folder. hub: through the package datasets."""
    train_split: str | None = None
    """Split that is trained on; the set's own when not given."""
    test_split: str | None = None
    """Split that is evaluated; the set's own when not given, or the rest of what is trained on for sets without one."""
    held_out_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the examples that is evaluated where a set has no split for it."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Parts of a cross-validation, each with the labels in the same proportion; null for none."""
    fold: NonNegative = 0
    """The part that is evaluated; the others are trained on."""
    max_examples: Positive | None = None
    """Train on at most so many examples, drawn by run.seed."""
    min_count: Positive = 1
    """Words that are seen fewer times in training are unknown (data.tokenizer=words)."""
    max_words: Positive | None = None
    """Size of the vocabulary of words, the most frequent ones (data.tokenizer=words)."""
    vocabulary: str | None = None
    """File with the words of an earlier run, words.json of its folder, in place of those of the training examples."""
    max_characters: Positive = 20
    """Characters of a word that are read, where the model has characters."""
    scheme: Literal["iob2", "bioes"] = "iob2"
    """How tags mark where an entity begins and ends."""
    stride: Positive = 128
    """Tokens by which windows over a long text move (answer)."""
    max_answer: Positive = 30
    """Tokens of the longest answer."""


class DistillConfig(Section):
    """Teachers whose soft labels a model of a task learns from (Hinton et al. 2015); model.soft_weight and model.temperature
    say how."""

    teachers: list[str] = []
    """Folders of runs that were trained on the same set; their probabilities are averaged."""
    weights: list[Annotated[float, Field(ge=0)]] | None = None
    """Weight of each teacher; all alike when not given."""
