"""Tasks from a config to their scores: one process and several, every head, folds, teachers, weights of a language model."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from disttrain.metrics import unknown_keys
from tests.chosen import chosen
from tests.runs.conftest import Workplace
from tests.runs.made_sets import write_set

PAPERS = Path(__file__).resolve().parents[2] / "configs" / "papers"
SMALL = ["data.cache_dir=cache", "log.console=plain", "train.epochs=null", "train.steps=2", "train.eval_every=0",
         "train.global_batch_size=4", "optim.warmup_steps=0", "precision=fp32"]  # fmt: skip
TINY = {"text_cnn": ["model.embedding_size=8", "model.channels=4"],
        "rnn": ["model.embedding_size=8", "model.hidden_size=8"],
        "bert": ["model.preset=null", "model.family=bert", "model.vocab_size=null", "model.layers=1", "model.hidden_size=16",
                 "model.heads=2", "data.tokenizer=bytes", "data.tokenizer_path=null", "data.lowercase=false",
                 "checkpoint.weights=null", "model.max_positions=128"]}  # fmt: skip
CNN = {
    "task": {"set": "mr", "path": "mr", "folds": 2},
    "model": {"family": "text_cnn", "embedding_size": 16, "channels": 8, "dropout": 0.2},
    "data": {"tokenizer": "words", "sequence_length": 12, "cache_dir": "cache"},
    "train": {"epochs": 6, "global_batch_size": 8, "eval_every": 10},
    "optim": {"lr": 1.0e-2, "schedule": "constant"},
    "precision": "fp64", "log": {"console": "plain"},
}  # fmt: skip


def with_config(workplace: Workplace, **values) -> Workplace:
    config = {**CNN, **{key: {**CNN.get(key, {}), **value} for key, value in values.items()}}
    (workplace.folder / "task.yaml").write_text(yaml.safe_dump(config))
    write_set(config["task"]["set"], workplace.folder / config["task"]["path"])
    return workplace


def test_two_ranks_equal_one_and_the_official_score_is_written(workplace: Workplace) -> None:
    with_config(workplace)
    workplace.run("train", "task.yaml", "run.name=one")
    done = workplace.run("train", "task.yaml", "run.name=two", "train.micro_batch_size=2", "--nproc", "2")
    for one, two in zip(workplace.curve("one"), workplace.curve("two"), strict=True):
        assert two == pytest.approx(one, rel=1e-10)
    assert len(workplace.curve("one")) == 30  # 40 examples in 6 epochs, 8 a step
    last, other = (workplace.records(name, "eval")[-1] for name in ("one", "two"))
    assert last["score_accuracy"] == other["score_accuracy"] == last["classify_accuracy"] > 0.85
    assert last["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-10)
    assert "accuracy" in done.stdout
    for name in ("one", "two"):
        lines = (workplace.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        assert all(unknown_keys(json.loads(line)) == [] for line in lines)
    told = json.loads(workplace.run("evaluate", "runs/one", "--json").stdout)
    assert told["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-10)
    assert told["score_accuracy"] == last["score_accuracy"]


def test_a_run_resumes_within_an_epoch(workplace: Workplace) -> None:
    with_config(workplace)
    workplace.run("train", "task.yaml", "run.name=whole")
    workplace.run("train", "task.yaml", "run.name=half", "train.steps=13", "train.epochs=null")
    workplace.run("train", "task.yaml", "run.name=half")
    assert workplace.curve("half") == workplace.curve("whole")


def test_folds_and_seeds_are_averaged(workplace: Workplace) -> None:
    with_config(workplace)
    words = ("finetune", "task.yaml", "train.epochs=2", "--folds")
    done = workplace.run(*words)
    found = json.loads((workplace.folder / "runs/task_repeated.json").read_text())
    assert found["runs"] == ["task_fold0", "task_fold1"]
    values = found["scores"]["score_accuracy"]
    assert values["mean"] == pytest.approx(np.mean(values["values"]))
    assert values["deviation"] == pytest.approx(np.std(values["values"], ddof=1))
    assert "accuracy" in done.stdout
    assert "task_fold0 is done" in workplace.run(*words).stdout


def test_tags_with_a_random_field(workplace: Workplace) -> None:
    rnn = {"family": "rnn", "hidden_size": 12, "layers": 1, "crf": True, "character_size": 6, "character_channels": 6}
    model = {"embedding_size": None, "channels": 128, **rnn}
    with_config(workplace, task={"set": "wnut17", "path": "wnut", "folds": None, "scheme": "bioes"}, model=model,
                train={"epochs": 14})  # fmt: skip
    workplace.run("train", "task.yaml", "--nproc", "2", "parallel.zero=2")
    assert workplace.records("task", "eval")[-1]["score_f1"] > 0.9


def test_a_language_model_becomes_one_that_answers(workplace: Workplace) -> None:
    """Weights of a BERT that was trained on text, a new head, and both splits of an articles' set."""
    workplace.run("train", "run.yaml", "model.family=bert", "data.document=line", "data.sequence_length=96",
                  "model.max_positions=96", "train.steps=2", "run.name=base")  # fmt: skip
    bert = {"family": "bert", "hidden_size": 32, "heads": 2, "layers": 1, "max_positions": 96, "dropout": 0.0}
    with_config(workplace, task={"set": "squad", "path": "squad", "folds": None, "stride": 8}, train={"epochs": 2},
                model={"embedding_size": None, "channels": 128, **bert}, checkpoint={"weights": "runs/base"},
                data={"tokenizer": "bytes", "sequence_length": 96})  # fmt: skip
    workplace.run("train", "task.yaml", "precision=fp32")
    (event,) = [e for e in workplace.records("task", "event") if e["event"] == "weights_loaded"]
    assert event["message"].endswith("but for new ones: head.out.bias, head.out.weight")
    assert {"score_f1", "score_exact_match", "answer_accuracy"} <= set(workplace.records("task", "eval")[-1])


def test_a_student_learns_from_soft_labels(workplace: Workplace) -> None:
    with_config(workplace, task={"folds": 2})
    workplace.run("train", "task.yaml", "run.name=teacher")
    student = ["model.family=rnn", "model.channels=128", "model.hidden_size=8", "distill.teachers=[runs/teacher]",
               "model.soft_weight=1.0", "model.temperature=2.0"]  # fmt: skip
    for name, ranks in ("one", ()), ("two", ("--nproc", "2")):
        workplace.run("train", "task.yaml", f"run.name={name}", *student, *ranks)
    (file,) = (workplace.folder / "cache").rglob("soft_*.npy")
    soft = np.load(file)
    assert soft.shape == (40, 2)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)
    assert workplace.records("one", "eval")[-1]["score_accuracy"] > 0.85
    for one, two in zip(workplace.curve("one"), workplace.curve("two"), strict=True):
        assert two == pytest.approx(one, rel=1e-10)
    refused = workplace.run("train", "task.yaml", "run.name=other", "distill.teachers=[runs/nobody]", code=2)
    assert "there is no good checkpoint in it" in " ".join(refused.stderr.split())


def test_patience_ends_a_run(workplace: Workplace) -> None:
    with_config(workplace, train={"epochs": 100, "eval_every": 2, "patience": 2})
    workplace.run("train", "task.yaml", "optim.lr=0.3")
    assert workplace.records("task", "summary")[-1]["stop_reason"] == "patience"


def tasks_of_papers() -> list[str]:
    return [path.name for path in sorted(PAPERS.glob("*.yaml")) if "task:" in path.read_text()]


@pytest.mark.parametrize("name", chosen(tasks_of_papers(), 5))
def test_every_paper_config_trains(workplace: Workplace, name: str) -> None:
    config = yaml.safe_load((PAPERS / name).read_text())
    model = config["model"]
    family = model.get("family") or model["preset"].split("-")[0]
    write_set(config["task"]["set"], workplace.folder / "set", 20)
    sizes = [word for word in TINY[family] if not (word == "checkpoint.weights=null" and "checkpoint" not in config)]
    length = min(96, config["data"]["sequence_length"])
    teacher = ["distill.teachers=[]", "model.soft_weight=0.5", "model.temperature=1.0"] if "distill" in config else []
    stride = ["task.stride=8"] if config["task"]["set"] == "squad" else []
    words = [*SMALL, *sizes, *teacher, *stride, "task.path=set", "run.name=small", f"data.sequence_length={length}"]
    workplace.run("train", str(PAPERS / name), *words)
    record = workplace.records("small", "eval")[-1]
    assert any(key.startswith("score_") for key in record)


def test_bad_settings_are_all_named_at_once(workplace: Workplace) -> None:
    with_config(workplace)
    bad = ["task.stride=7", "model.crf=true", "parallel.tensor=2", "data.corpus=text", "model.temperature=2.0",
           "task.fold=7", "train.patience=3", "train.eval_every=0"]  # fmt: skip
    done = workplace.run("train", "task.yaml", *bad, code=2)
    told = " ".join(done.stderr.split())
    for words in ("task.stride=7", "model.crf=true", "this small encoder is not cut", "data.corpus=text",
                  "model.temperature=2.0", "there is no such fold", "train.patience=3"):  # fmt: skip
        assert words in told, words
    assert "did you mean mr?" in " ".join(workplace.run("train", "task.yaml", "task.set=mrr", code=2).stderr.split())
    lost = workplace.run("train", "task.yaml", "task.path=nowhere", code=2)
    assert "rt-polarity.all" in lost.stderr
