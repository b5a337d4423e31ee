"""Checks of tasks: what a head, a family and the labelled examples ask of each other and of the layout. No torch."""

import difflib
from collections.abc import Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import given, no_effect, setting
from disttrain.config.task import SMALL
from disttrain.sets import SETS

OF_HEADS = {
    "labels": ("classify", "tag"), "loss": ("classify", "tag"), "focal_gamma": ("classify", "tag"),
    "focal_alpha": ("classify", "tag"), "ghm_bins": ("classify", "tag"), "crf": ("tag",),
    "soft_weight": ("classify", "tag"), "temperature": ("classify", "tag"),
    "top_attention_heads": ("classify", "regress", "tag", "answer"),
}  # fmt: skip
"""Heads that read a setting of the model."""
OF_FAMILIES = {
    "embedding_size": SMALL, "cell": ("rnn",), "bidirectional": ("rnn",), "kernels": ("text_cnn",),
    "channels": ("text_cnn",), "character_size": SMALL, "character_channels": SMALL, "embedding_dropout": SMALL,
}  # fmt: skip
"""Families that read a setting of the model."""
OF_SETS = ("path", "source", "train_split", "test_split", "held_out_fraction", "folds", "fold", "max_examples", "min_count",
           "max_words", "vocabulary", "max_characters", "scheme", "stride", "max_answer")  # fmt: skip
UNUSED_DATA = ("corpus", "path", "blend", "held_out_path", "held_out_fraction", "document", "text_field", "max_bytes",
               "mlm_probability", "short_sequence_probability", "workers")  # fmt: skip


def task_problems(config: Config) -> Iterator[Problem]:
    """Every contradiction of `task`, `model.head` and `model.family`."""
    yield from _head(config)
    yield from _layout(config)
    yield from _examples(config)
    yield from _teachers(config)


def _teachers(config: Config) -> Iterator[Problem]:
    distill = config.distill
    if distill.teachers and config.model.head not in ("classify", "tag"):
        yield Problem((setting(config, "distill.teachers"), setting(config, "model.head")),
                      "soft labels are probabilities of classes", "give task.set of a set with classes")  # fmt: skip
    if distill.teachers and (config.model.loss != "cross_entropy" or config.model.crf):
        yield Problem((setting(config, "distill.teachers"), setting(config, "model.loss"), setting(config, "model.crf")),
                      "soft labels are learned by cross-entropy",
                      "use model.loss=cross_entropy and model.crf=false")  # fmt: skip
    if distill.weights is not None and (len(distill.weights) != len(distill.teachers) or not sum(distill.weights)):
        yield Problem((setting(config, "distill.weights"), setting(config, "distill.teachers")),
                      "there is not one weight for each teacher, one of them above 0",
                      "give as many weights as teachers")  # fmt: skip
    for key in ("model.soft_weight", "model.temperature"):
        if given(config, key) and not distill.teachers:
            yield no_effect(config, key, "distill.teachers", "distill.teachers=[runs/teacher]")


def _head(config: Config) -> Iterator[Problem]:
    model, task = config.model, config.task
    head, family, chosen = setting(config, "model.head"), setting(config, "model.family"), setting(config, "task.set")
    named = SETS.get(task.set or "")
    kind = model.head if named is None else named.kind
    conflicts = (
        (model.family in SMALL and task.set is None, (family, chosen), "this family does not model language",
         "give task.set, or use model.family=gpt"),
        (kind != model.head, (head, chosen), "the examples are for another head", f"use model.head={kind}, or leave it out"),
        (model.head != "lm" and task.set is None, (head, chosen), "nothing says where labelled examples are from",
         "give task.set"),
        (model.head != "lm" and model.source is not None, (setting(config, "model.source"), head),
         "a model of your own models language", "remove model.source or task.set"),
        (model.family == "text_cnn" and model.head in ("tag", "answer"), (family, head), "it reads a sequence as a whole",
         "use model.family=rnn"),
        (model.loss == "ghm" and config.train.micro_batch_size is not None,
         ("model.loss=ghm", setting(config, "train.micro_batch_size")),
         "its density is of all examples of a step, which must then be computed at once",
         "leave train.micro_batch_size out"),
        (model.loss == "ghm" and config.parallel.pipeline > 1, ("model.loss=ghm", setting(config, "parallel.pipeline")),
         "its density is of all examples of a step, and a pipeline takes them in parts", "use parallel.pipeline=1"),
    )  # fmt: skip
    yield from (Problem(settings, message, fix) for wrong, settings, message, fix in conflicts if wrong)
    for keys, value, because in ((OF_HEADS, model.head, "model.head"), (OF_FAMILIES, model.family, "model.family")):
        for key, takes in keys.items():
            if given(config, f"model.{key}") and value not in takes:
                fix = f"a set that is for {' or '.join(takes)}" if because == "model.head" else f"{because}={takes[0]}"
                yield no_effect(config, f"model.{key}", because, fix)
    smooths = model.head in ("lm", "classify", "tag") and model.loss == "cross_entropy" and not model.crf
    if config.train.label_smoothing and not smooths:
        yield Problem((setting(config, "train.label_smoothing"), head, setting(config, "model.loss"),
                       setting(config, "model.crf")), "only cross-entropy of labels is smoothed",
                      "use train.label_smoothing=0, or model.loss=cross_entropy and model.crf=false")  # fmt: skip
    for key, loss in (("focal_gamma", "focal"), ("focal_alpha", "focal"), ("ghm_bins", "ghm")):
        if given(config, f"model.{key}") and model.loss != loss and model.head in OF_HEADS[key]:
            yield no_effect(config, f"model.{key}", "model.loss", f"model.loss={loss}")


def _layout(config: Config) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    if model.head == "lm" or model.family not in SMALL:
        if model.head != "lm" and parallel.context > 1:
            yield Problem((setting(config, "parallel.context"), setting(config, "model.head")),
                          "the head of a task reads whole sequences", "use parallel.context=1")  # fmt: skip
        return
    for axis in ("tensor", "pipeline", "context"):
        if getattr(parallel, axis) > 1:
            yield Problem((setting(config, f"parallel.{axis}"), setting(config, "model.family")),
                          "this small encoder is not cut", f"use parallel.{axis}=1")  # fmt: skip
    if parallel.recompute != "none":
        yield Problem((setting(config, "parallel.recompute"), setting(config, "model.family")),
                      "this small encoder computes nothing again", "use parallel.recompute=none")  # fmt: skip
    if config.run.compile:
        yield Problem(("run.compile=true", setting(config, "model.family")), "this small encoder is not compiled",
                      "use run.compile=false")  # fmt: skip


def _examples(config: Config) -> Iterator[Problem]:
    task = config.task
    if task.set is None:
        yield from _without_set(config)
        return
    if task.set not in SETS:
        near = difflib.get_close_matches(task.set, SETS, n=1, cutoff=0.0)[0]
        yield Problem((setting(config, "task.set"),), "there is no set of this name",
                      f"did you mean {near}? There are {', '.join(SETS)}")  # fmt: skip
    for key in (f"data.{name}" for name in UNUSED_DATA):
        if given(config, key):
            yield no_effect(config, key, "task.set", "task.set=null")
    words = config.data.tokenizer == "words"
    if config.model.character_size and not words:
        yield Problem((setting(config, "model.character_size"), setting(config, "data.tokenizer")),
                      "only words have characters", "use data.tokenizer=words")  # fmt: skip
    if task.folds is not None and task.fold >= task.folds:
        yield Problem((setting(config, "task.fold"), setting(config, "task.folds")), "there is no such fold",
                      f"use task.fold={task.folds - 1} or less")  # fmt: skip
    own = task.vocabulary is None
    read = (
        ("task.min_count", words, "data.tokenizer", "data.tokenizer=words"),
        ("task.max_words", words, "data.tokenizer", "data.tokenizer=words"),
        ("task.vocabulary", words, "data.tokenizer", "data.tokenizer=words"),
        ("task.min_count", own or not words, "task.vocabulary", "task.vocabulary=null"),
        ("task.max_words", own or not words, "task.vocabulary", "task.vocabulary=null"),
        ("task.max_characters", config.model.character_size, "model.character_size", "model.character_size=30"),
        ("task.fold", task.folds is not None, "task.folds", "task.folds=10"),
        ("task.stride", config.model.head == "answer", "task.set", "task.set=squad"),
        ("task.max_answer", config.model.head == "answer", "task.set", "task.set=squad"),
        ("task.scheme", config.model.head == "tag", "task.set", "a set of tagged words"),
    )
    yield from (
        no_effect(config, key, because, fix) for key, used, because, fix in read if given(config, key) and not used
    )


def _without_set(config: Config) -> Iterator[Problem]:
    for key in (f"task.{name}" for name in OF_SETS):
        if given(config, key):
            yield no_effect(config, key, "task.set", "task.set=NAME")
    for key in (f"cleaning.{name}" for name in type(config.cleaning).model_fields):
        if given(config, key):
            yield no_effect(config, key, "task.set", "task.set=NAME")
    if config.train.epochs is not None:
        yield no_effect(config, "train.epochs", "task.set", "train.steps or train.tokens")
    if config.data.tokenizer == "words":
        yield Problem(("data.tokenizer=words", "task.set=null"), "its words are those of a task's examples",
                      "use data.tokenizer=bytes, bpe or wordpiece")  # fmt: skip
