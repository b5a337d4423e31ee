"""The data sets that this package reads: kind, labels, official scores, files and columns. Their one home.

GLUE (Wang et al. 2019, table 1) in the layout of its download script; IMDb (Maas et al. 2011); MR, SUBJ, MPQA, CR, TREC
and SST as files of label and text (Kim 2014, table 1); CoNLL-2003 (Tjong Kim Sang and De Meulder 2003); WNUT-17
(Derczynski et al. 2017); SQuAD v1.1 (Rajpurkar et al. 2016).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["classify", "regress", "tag", "answer"]
Layout = Literal["tsv", "folders", "label_text", "columns", "squad"]


@dataclass(frozen=True)
class Columns:
    """Where a row of a TSV file has its texts and its label."""

    texts: tuple[str, ...]
    """Names of the columns of the text, or of the two texts."""
    label: str
    """Name of the column of the label."""
    without_header: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the columns, by split, of files that have no header."""
    drops_short_rows: bool = False
    """Whether rows with too few columns are known to occur and are left out (QQP), not refused."""


@dataclass(frozen=True)
class Hub:
    """The same set on the Hugging Face hub. A label is an index into the set's labels there, or -1."""

    path: str
    config: str | None
    texts: tuple[str, ...]
    """Keys of a record: the texts, the words, or for SQuAD nothing."""
    label: str
    splits: Mapping[str, str]
    """The hub's name of each split."""


@dataclass(frozen=True)
class LabelledSet:
    """A data set."""

    name: str
    kind: Kind
    """classify and regress: `Sentences`. tag: `Tagged`. answer: `Question`."""
    labels: tuple[str, ...]
    """Classes or IOB2 tags; the index is the class number. Empty for regress and answer."""
    scores: tuple[str, ...]
    """Official scores, keys of `disttrain.scores.official.official`; the first one chooses between models."""
    layout: Layout
    files: Mapping[str, tuple[str, ...]]
    """Names of each split's file in the folder; the first one that is there is read."""
    rows: Mapping[str, int]
    """Published number of examples of each split."""
    columns: Columns | None = None
    """Of a TSV file."""
    hub: Hub | None = None
    positive: str | None = None
    """The class whose precision, recall and F1 are the official ones; None where they are not binary."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest score of a regression."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits; one that is called all is meant for cross-validation."""
        return tuple(self.files)


_TSV = {split: (f"{split}.tsv",) for split in ("train", "dev", "test")}
_MNLI = {"train": ("train.tsv",), "dev": ("dev_matched.tsv",), "dev_mismatched": ("dev_mismatched.tsv",),
         "test": ("test_matched.tsv",), "test_mismatched": ("test_mismatched.tsv",)}  # fmt: skip
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_MNLI_HUB_SPLITS = {"train": "train", "dev": "validation_matched", "dev_mismatched": "validation_mismatched",
                    "test": "test_matched", "test_mismatched": "test_mismatched"}  # fmt: skip
_COLA = ("source", "label", "mark", "sentence")
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")


def _iob2(*types: str) -> tuple[str, ...]:
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def _glue(name: str, labels: tuple[str, ...], scores: tuple[str, ...], texts: tuple[str, ...], label: str,
          rows: tuple[int, ...], positive: str | None = None, hub_texts: tuple[str, ...] | None = None,
          **columns: object) -> LabelledSet:  # fmt: skip
    files, splits = (_MNLI, _MNLI_HUB_SPLITS) if name == "mnli" else (_TSV, _HUB_SPLITS)
    return LabelledSet(
        name=name,
        kind="classify" if labels else "regress",
        labels=labels,
        scores=scores,
        layout="tsv",
        files=files,
        rows=dict(zip(files, rows, strict=True)),
        columns=Columns(texts, label, **columns),  # pyright: ignore[reportArgumentType]
        hub=Hub("nyu-mll/glue", name, hub_texts or texts, "label", splits),
        positive=positive,
        bounds=None if labels else (0.0, 5.0),
    )


def _label_text(name: str, classes: int, files: Mapping[str, str], rows: tuple[int, ...]) -> LabelledSet:
    return LabelledSet(
        name=name,
        kind="classify",
        labels=tuple(map(str, range(classes))),
        scores=("accuracy",),
        layout="label_text",
        files={split: (file,) for split, file in files.items()},
        rows=dict(zip(files, rows, strict=True)),
    )


_SPLITS = ("train", "dev", "test")

_ALL = (
    _glue("cola", _BINARY, ("matthews",), ("sentence",), "label", (8551, 1043, 1063),
          without_header={"train": _COLA, "dev": _COLA}),
    _glue("sst2", _BINARY, ("accuracy",), ("sentence",), "label", (67349, 872, 1821)),
    _glue("mrpc", _BINARY, ("accuracy", "f1"), ("#1 String", "#2 String"), "Quality", (3668, 408, 1725), "1", _PAIR),
    _glue("qqp", _BINARY, ("accuracy", "f1"), ("question1", "question2"), "is_duplicate", (363846, 40430, 390965), "1",
          drops_short_rows=True),
    _glue("stsb", (), ("pearson", "spearman"), _PAIR, "score", (5749, 1500, 1379)),
    _glue("mnli", ("entailment", "neutral", "contradiction"), ("accuracy",), _PAIR, "gold_label",
          (392702, 9815, 9832, 9796, 9847), hub_texts=("premise", "hypothesis")),
    _glue("qnli", _ENTAILMENT, ("accuracy",), ("question", "sentence"), "label", (104743, 5463, 5463)),
    _glue("rte", _ENTAILMENT, ("accuracy",), _PAIR, "label", (2490, 277, 3000)),
    _glue("wnli", _BINARY, ("accuracy",), _PAIR, "label", (635, 71, 146)),
    LabelledSet("imdb", "classify", ("neg", "pos"), ("accuracy", "precision", "recall", "f1"), "folders",
                {"train": ("train",), "test": ("test",)}, {"train": 25000, "test": 25000}, positive="pos",
                hub=Hub("stanfordnlp/imdb", None, ("text",), "label", {"train": "train", "test": "test"})),
    _label_text("mr", 2, {"all": "rt-polarity.all"}, (10662,)),
    _label_text("subj", 2, {"all": "subj.all"}, (10000,)),
    _label_text("mpqa", 2, {"all": "mpqa.all"}, (10606,)),
    _label_text("cr", 2, {"all": "custrev.all"}, (3775,)),
    _label_text("trec", 6, {"train": "TREC.train.all", "test": "TREC.test.all"}, (5452, 500)),
    _label_text("sst_binary", 2, {split: f"stsa.binary.{split}" for split in _SPLITS}, (6920, 872, 1821)),
    _label_text("sst_fine", 5, {split: f"stsa.fine.{split}" for split in _SPLITS}, (8544, 1101, 2210)),
    LabelledSet("conll2003", "tag", _iob2("PER", "ORG", "LOC", "MISC"), ("f1", "precision", "recall"), "columns",
                {"train": ("eng.train", "train.txt"), "dev": ("eng.testa", "valid.txt", "dev.txt"),
                 "test": ("eng.testb", "test.txt")}, {"train": 14041, "dev": 3250, "test": 3453},
                hub=Hub("eriktks/conll2003", None, ("tokens",), "ner_tags", _HUB_SPLITS)),
    LabelledSet("wnut17", "tag", _iob2("corporation", "creative-work", "group", "location", "person", "product"),
                ("f1", "precision", "recall", "surface_f1", "surface_precision", "surface_recall"), "columns",
                {"train": ("wnut17train.conll",), "dev": ("emerging.dev.conll",), "test": ("emerging.test.annotated",)},
                {"train": 3394, "dev": 1009, "test": 1287},
                hub=Hub("leondz/wnut_17", None, ("tokens",), "ner_tags", _HUB_SPLITS)),
    LabelledSet("squad", "answer", (), ("f1", "exact_match"), "squad",
                {"train": ("train-v1.1.json",), "dev": ("dev-v1.1.json",)}, {"train": 87599, "dev": 10570},
                hub=Hub("rajpurkar/squad", "plain_text", (), "answers", {"train": "train", "dev": "validation"})),
)  # fmt: skip

SETS: Mapping[str, LabelledSet] = {one.name: one for one in _ALL}
"""Every set by name. dev and test of mnli are the matched ones; conll2003's rows are without document starts."""


def tags_of(labels: tuple[str, ...], scheme: str) -> tuple[str, ...]:
    """The classes of a set: IOB2 tags also as BIOES, which marks the last word of an entity, and those of one word."""
    if scheme == "iob2" or "O" not in labels:
        return labels
    types = [label[2:] for label in labels if label.startswith("B-")]
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BIES"))
