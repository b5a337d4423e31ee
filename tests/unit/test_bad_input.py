"""Every mistake a user can make in a config: refused at once, all of them together, with a fix, nothing started."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from disttrain import preflight
from disttrain.config.load import load
from disttrain.config.problems import Problem, RefusedInput

GOOD = {
    "model": {"family": "gpt", "layers": 2, "hidden_size": 32, "heads": 4, "max_positions": 64},
    "data": {"corpus": "text", "path": "corpus", "tokenizer": "bytes", "sequence_length": 32},
    "train": {"steps": 10, "global_batch_size": 8},
}


def problems_of(folder: Path, *overrides: str, world_size: int = 1, text: str | None = None) -> list[Problem]:
    """What is wrong with the good config after these changes."""
    config = folder / "run.yaml"
    config.write_text(text if text is not None else yaml.safe_dump(GOOD))
    base = ["run.dir=runs", f"data.cache_dir={folder / 'cache'}"] if text is None else []
    try:
        return preflight.problems(load(config, [*base, *overrides]), world_size)
    except RefusedInput as refused:
        return refused.problems


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for number in range(4):
        (tmp_path / "corpus" / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. \n" * 200)
    return tmp_path


def test_the_good_config_is_good(folder: Path) -> None:
    assert problems_of(folder) == []


UNKNOWN = [
    ("model.hiden_size=32", "model.hidden_size"),
    ("train.step=10", "train.steps"),
    ("optim.learning_rate=1", None),
    ("dta.path=x", "data"),
    ("optim.dropout=0.1", "model.dropout"),
    ("log.wanb=true", "log.wandb"),
    ("parallel.tensors=2", "parallel.tensor"),
    ("precison=bf16", "precision"),
    ("checkpoint.evry=5", "checkpoint.every"),
    ("data.blend=[{corpus: text, path: corpus, wieght: 1}]", None),
]


@pytest.mark.parametrize(("override", "guess"), UNKNOWN)
def test_unknown_keys(folder: Path, override: str, guess: str | None) -> None:
    found = problems_of(folder, override)
    (problem,) = [p for p in found if p.message == "unknown setting"]
    assert guess is None or guess in problem.fix


WRONG_VALUES = [
    "model.layers=four", "model.layers=4.5", "model.layers=true", "model.layers=0", "model.layers=-1", "model.layers=",
    "model.family=llama", "model.preset=gpt2-125m", "model.preset=7", "model.dropout=1.0", "model.dropout=-0.1",
    "model=gpt", "run.name=../escape", "run.name=", "run.seed=-1", "run.seed=now", "run.device=tpu",
    "train.steps=0", "train.steps=1.5", "train.global_batch_size=big", "train.clip_grad_norm=0",
    "train.clip_grad_norm=.inf", "train.seconds=-3", "train.label_smoothing=1", "train.target_loss=0",
    "optim.name=adam2", "optim.lr=0", "optim.lr=fast", "optim.lr=.nan", "optim.beta1=1", "optim.schedule=cosin",
    "optim.min_lr_ratio=2", "optim.decay_fraction=0", "optim.warmup_steps=-1", "optim.weight_decay=-1",
    "precision=fp8", "precision=16", "engine=megatron", "loss_scale.initial=0", "data.corpus=wikipedia",
    "data.sequence_length=4", "data.mlm_probability=0", "data.held_out_fraction=0.9", "data.document=page",
    "data.workers=0", "data.tokenizer_vocab_size=10", "data.blend=5", "checkpoint.keep=0", "checkpoint.every=-1",
    "log.every=0", "log.console=rainbow", "log.wandb=maybe", "log.wandb_mode=sometimes", "parallel.zero=4",
    "parallel.tensor=0", "parallel.recompute=some", "parallel.schedule=1f2b", "parallel.virtual_stages=0",
    "parallel.context_method=flash", "parallel.offload=disk", "run.compile=fast",
]  # fmt: skip


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_wrong_types_and_values(folder: Path, override: str) -> None:
    key = override.split("=")[0]
    found = problems_of(folder, override)
    assert any(any(s.split("=")[0] == key for s in p.settings) for p in found), found
    assert all(p.fix and p.message for p in found)


ONE_BIT_ADAM = ["compression.codec=onebit_adam", "compression.warmup_steps=2"]
PIPELINE = ["parallel.pipeline=2", "train.micro_batch_size=1"]

CONTRADICTIONS: list[tuple[str, list[str], int, list[str], str]] = [
    ("heads", ["model.heads=5"], 1, ["model.heads=5", "model.hidden_size=32"], "model.heads=4"),
    ("positions", ["data.sequence_length=128"], 1, ["data.sequence_length=128", "model.max_positions=64"], "64"),
    ("vocabulary", ["model.vocab_size=100"], 1, ["model.vocab_size=100"], ""),
    ("no length", ["train.steps=null"], 1, ["train.steps", "train.tokens"], "train.steps"),
    ("world and batch", [], 3, ["train.global_batch_size=8", "data ranks 3"], "train.global_batch_size=9"),
    ("more ranks than sequences", [], 16, ["train.global_batch_size=8", "data ranks 16"], "16"),
    ("micro-batch", ["train.micro_batch_size=3"], 2, ["train.micro_batch_size=3"], "train.micro_batch_size=2"),
    ("micro-batch too large", ["train.micro_batch_size=16"], 1, ["train.micro_batch_size=16"], "micro_batch_size=8"),
    ("warm-up", ["optim.warmup_steps=11"], 1, ["optim.warmup_steps=11"], "10"),
    ("inverse_sqrt", ["optim.schedule=inverse_sqrt"], 1, ["optim.schedule=inverse_sqrt"], "warmup"),
    ("wsd only", ["optim.decay_fraction=0.5"], 1, ["optim.decay_fraction=0.5", "optim.schedule=cosine"], "wsd"),
    ("no minimum", ["optim.schedule=constant", "optim.min_lr_ratio=0.5"], 1, ["optim.min_lr_ratio=0.5"], "remove"),
    ("target never seen", ["train.target_loss=2"], 1, ["train.target_loss=2.0"], "eval_every"),
    ("kept but not written", ["checkpoint.keep_every=10", "checkpoint.every=4"], 1,
     ["checkpoint.keep_every=10", "checkpoint.every=4"], "checkpoint.every=10"),
    ("best without a loss", ["checkpoint.keep_best=1", "checkpoint.every=4", "train.eval_every=3"], 1,
     ["checkpoint.keep_best=1", "checkpoint.every=4", "train.eval_every=3"], "train.eval_every=4"),
    ("candidates without auto", ["compression.codec=int8", "compression.candidates=[bf16]"], 2,
     ["compression.candidates=['bf16']", "compression.codec=int8"], "compression.codec=auto"),
    ("scale without fp16", ["loss_scale.initial=1024"], 1, ["loss_scale.initial=1024"], "fp16"),
    ("scale bounds", ["precision=fp16", "loss_scale.initial=1", "loss_scale.minimum=2"], 1, ["loss_scale.initial=1.0"], ""),
    ("project without wandb", ["log.wandb_project=x"], 1, ["log.wandb_project=x", "log.wandb=false"], "log.wandb=true"),
    ("mode without wandb", ["log.wandb_mode=offline"], 1, ["log.wandb_mode=offline"], "log.wandb=true"),
    ("ratio without top-k", ["compression.codec=int8", "compression.ratio=0.1"], 2,
     ["compression.ratio=0.1", "compression.codec=int8"], "compression.codec=topk"),
    ("rank without PowerSGD", ["compression.rank=2"], 2, ["compression.rank=2"], "compression.codec=powersgd"),
    ("feedback without codec", ["compression.error_feedback=true"], 2, ["compression.error_feedback=true"], "codec"),
    ("no link to code", ["parallel.tensor=2", "compression.codec=int8"], 2, ["compression.codec=int8", "world size 2"],
     "compression.codec=none"),
    ("coded and offloaded", ["parallel.zero=2", "parallel.offload=true", "compression.codec=int8"], 2,
     ["compression.codec=int8", "parallel.offload=true"], "parallel.offload=false"),
    ("warm-up without a codec", ["compression.warmup_steps=2"], 2, ["compression.warmup_steps=2", "compression.codec=none"],
     "another compression.codec"),
    ("a codec that never starts", ["compression.codec=topk", "compression.warmup_steps=10"], 2,
     ["compression.warmup_steps=10", "10 training steps"], "at most compression.warmup_steps=9"),
    ("1-bit Adam of workers", [*ONE_BIT_ADAM, "outer.method=average"], 2,
     ["compression.codec=onebit_adam", "outer.method=average"], "compression.codec=sign"),
    ("1-bit Adam without warm-up", ["compression.codec=onebit_adam"], 2,
     ["compression.codec=onebit_adam", "compression.warmup_steps=0", "10 training steps"], "compression.warmup_steps, "),
    ("1-bit Adam, all warm-up", [*ONE_BIT_ADAM, "compression.warmup_steps=10"], 2,
     ["compression.codec=onebit_adam", "compression.warmup_steps=10"], "for example 1"),
    ("1-bit Adam with LAMB", [*ONE_BIT_ADAM, "optim.name=lamb"], 2, ["compression.codec=onebit_adam", "optim.name=lamb"],
     "use optim.name=adamw or compression.codec=onebit_lamb"),
    ("1-bit LAMB with Adam", [*ONE_BIT_ADAM, "compression.codec=onebit_lamb"], 2,
     ["compression.codec=onebit_lamb", "optim.name=adamw"], "use optim.name=lamb or compression.codec=onebit_adam"),
    ("1-bit Adam with ZeRO", [*ONE_BIT_ADAM, "parallel.zero=1"], 2, ["compression.codec=onebit_adam", "parallel.zero=1"],
     "parallel.zero=0"),
    ("1-bit Adam on another engine", ["engine=horovod", *ONE_BIT_ADAM], 2,
     ["engine=horovod", "compression.codec=onebit_adam"], "codec=none"),
    ("LAMB on DeepSpeed", ["engine=deepspeed", "optim.name=lamb"], 2, ["engine=deepspeed", "optim.name=lamb"],
     "optim.name=adamw"),
    ("LAMB on Horovod", ["engine=horovod", "optim.name=lamb"], 2, ["engine=horovod", "optim.name=lamb"],
     "optim.name=adamw"),
    ("AdamW's kernels for LAMB", ["optim.name=lamb", "optim.implementation=foreach"], 1,
     ["optim.implementation=foreach", "optim.name=lamb"], "optim.name=adamw"),
    ("codec on another engine", ["engine=horovod", "compression.codec=int8"], 2, ["engine=horovod"], "codec=none"),
    ("outer without a method", ["outer.every=8"], 2, ["outer.every=8", "outer.method=none"], "outer.method=nesterov"),
    ("outer rate of a mean", ["outer.method=average", "outer.lr=0.5"], 2, ["outer.lr=0.5", "outer.method=average"],
     "outer.method=nesterov"),
    ("mixing what is not late", ["outer.method=nesterov", "outer.mixing=0.2"], 2,
     ["outer.mixing=0.2", "outer.overlap=0"], "outer.overlap=1"),
    ("workers that share weights", ["outer.method=nesterov", "parallel.zero=2"], 2,
     ["outer.method=nesterov", "parallel.zero=2"], "parallel.replicate"),
    ("workers that share sequences", ["outer.method=average", "parallel.context=2"], 4,
     ["outer.method=average", "parallel.context=2"], "parallel.context=1"),
    ("outer and offloaded", ["outer.method=average", "parallel.zero=2", "parallel.replicate=2", "parallel.offload=true"], 4,
     ["outer.method=average", "parallel.offload=true"], "parallel.offload=false"),
    ("outer and auto", ["outer.method=average", "compression.codec=auto"], 2,
     ["outer.method=average", "compression.codec=auto"], "compression.codec=none"),
    ("Adasum of codes", ["outer.method=adasum", "compression.codec=int8"], 2,
     ["outer.method=adasum", "compression.codec=int8"], "compression.codec=none"),
    ("Adasum of shards", ["outer.method=adasum", "parallel.zero=1", "parallel.replicate=2"], 4,
     ["outer.method=adasum", "parallel.zero=1"], "parallel.zero=0"),
    ("Adasum late", ["outer.method=adasum", "outer.overlap=1"], 2, ["outer.method=adasum", "outer.overlap=1"],
     "outer.overlap=0"),
    ("overlap beyond a round", ["outer.method=average", "outer.every=4", "outer.overlap=4"], 2,
     ["outer.overlap=4", "outer.every=4"], "outer.overlap=3"),
    ("more fragments than blocks", ["outer.method=average", "outer.fragments=9"], 2,
     ["outer.fragments=9", "outer.every=32"], "outer.fragments="),
    ("outer on another engine", ["engine=horovod", "outer.method=average"], 2, ["engine=horovod"], "outer.method=none"),
    ("world and mesh", ["parallel.tensor=2"], 3, ["world size 3"], "multiple of 2"),
    ("too few ranks", ["parallel.tensor=2", "parallel.pipeline=2"], 2, ["world size 2"], "multiple of 4"),
    ("replicas and ranks", ["parallel.zero=2", "parallel.replicate=3"], 4, ["world size 4"], "multiple of 3"),
    ("heads over ranks", ["parallel.tensor=3"], 3, ["parallel.tensor=3", "model.heads=4"], "parallel.tensor=2"),
    ("features over ranks", ["parallel.tensor=4", "model.ffn_hidden_size=126"], 4,
     ["parallel.tensor=4", "model.ffn_hidden_size=126"], "parallel.tensor=2"),
    ("rows over ranks", ["parallel.tensor=4", "model.vocab_size=3"], 4, ["parallel.tensor=4", "model.vocab_size=3"],
     "parallel.tensor=2"),
    ("ulysses heads", ["parallel.context=8", "parallel.context_method=ulysses", "data.sequence_length=48"], 8,
     ["parallel.context_method=ulysses", "parallel.context=8", "model.heads=4"], "parallel.context=4"),
    ("ulysses heads of a tensor rank",
     ["parallel.tensor=2", "parallel.context=4", "parallel.context_method=ulysses"], 8,
     ["parallel.context_method=ulysses", "parallel.context=4", "model.heads=4", "parallel.tensor=2"],
     "parallel.context_method=ring"),
    ("zigzag chunks", ["parallel.context=2", "data.sequence_length=30"], 2,
     ["data.sequence_length=30", "parallel.context=2"], "data.sequence_length=32"),
    ("chunks of a bert", ["model.family=bert", "parallel.context=4", "data.sequence_length=30"], 4,
     ["data.sequence_length=30", "parallel.context=4"], "data.sequence_length=32"),
    ("positions over ranks", ["parallel.tensor=4", "parallel.sequence=true", "data.sequence_length=30"], 4,
     ["parallel.sequence=true", "parallel.tensor=4", "data.sequence_length=30"], "data.sequence_length=32"),
    ("positions over ranks and context",
     ["parallel.tensor=4", "parallel.sequence=true", "parallel.context=2", "data.sequence_length=36"], 8,
     ["parallel.sequence=true", "parallel.tensor=4", "parallel.context=2"], "data.sequence_length=40"),
    ("sequence without tensor", ["parallel.sequence=true"], 1, ["parallel.sequence=true"], "parallel.tensor"),
    ("replicate without zero", ["parallel.replicate=2"], 2, ["parallel.replicate=2"], "parallel.zero"),
    ("offload without zero", ["parallel.offload=true"], 1, ["parallel.offload=true", "parallel.zero=0"], "parallel.zero"),
    ("method without context", ["parallel.context_method=ulysses"], 1,
     ["parallel.context_method=ulysses", "parallel.context=1"], "parallel.context=2"),
    ("schedule without stages", ["parallel.schedule=gpipe"], 1, ["parallel.schedule=gpipe", "parallel.pipeline=1"],
     "remove"),
    ("virtual stages without stages", ["parallel.virtual_stages=2"], 1,
     ["parallel.virtual_stages=2", "parallel.pipeline=1"], "remove"),
    ("virtual stages of 1f1b", [*PIPELINE, "parallel.virtual_stages=2"], 2,
     ["parallel.virtual_stages=2", "parallel.schedule=1f1b"], "interleaved_1f1b"),
    ("virtual stages of zbv", [*PIPELINE, "model.layers=8", "parallel.schedule=zbv", "parallel.virtual_stages=4"], 2,
     ["parallel.virtual_stages=4", "parallel.schedule=zbv"], "remove"),
    *((f"{schedule} and zero 3", [*PIPELINE, "model.layers=4", f"parallel.schedule={schedule}", "parallel.zero=3"], 2,
       [f"parallel.schedule={schedule}", "parallel.zero=3"], "parallel.zero=2")
      for schedule in ("interleaved_zero_bubble", "zbv", "dualpipev")),
    *((f"zbv and {setting}", [*PIPELINE, "model.layers=4", "parallel.schedule=zbv", setting], 2,
       ["parallel.schedule=zbv", setting], "parallel.schedule=1f1b")
      for setting in ("parallel.recompute=full", "run.compile=true")),
    ("more stages than layers", ["parallel.pipeline=4", "train.micro_batch_size=1"], 4,
     ["parallel.pipeline=4", "model.layers=2"], ""),
    ("more virtual stages than layers", [*PIPELINE, "parallel.schedule=interleaved_1f1b"], 2,
     ["parallel.pipeline=2", "model.layers=2"], ""),
    ("one micro-batch under 1f1b", ["parallel.pipeline=2"], 2, ["parallel.schedule=1f1b", "parallel.pipeline=2"],
     "train.micro_batch_size"),
    ("few micro-batches for dualpipev",
     ["parallel.pipeline=2", "model.layers=4", "parallel.schedule=dualpipev", "train.micro_batch_size=4"], 2,
     ["parallel.schedule=dualpipev", "parallel.pipeline=2"], "train.micro_batch_size"),
    ("micro-batches in rounds",
     ["parallel.pipeline=2", "model.layers=4", "parallel.schedule=interleaved_1f1b", "train.global_batch_size=5",
      "train.micro_batch_size=1"], 2, ["parallel.schedule=interleaved_1f1b", "parallel.pipeline=2"], "multiple of 2"),
    ("ZeRO under horovod", ["engine=horovod", "parallel.zero=1"], 2, ["engine=horovod", "parallel.zero=1"], "zero=0"),
    ("fp64 under deepspeed", ["engine=deepspeed", "precision=fp64"], 1, ["engine=deepspeed", "precision=fp64"], "fp32"),
    ("deepspeed's settings elsewhere", ["deepspeed={zero_optimization: {overlap_comm: true}}"], 1,
     ["engine=native", "deepspeed.zero_optimization"], "engine=deepspeed"),
    ("resume path", ["checkpoint.resume=no/such/step_00000001"], 1, ["checkpoint.resume=no/such/step_00000001"], "auto"),
    ("no corpus", ["data.corpus=null", "data.path=null"], 1, ["data.corpus"], ""),
    ("missing path", ["data.path=nowhere"], 1, ["data.path=nowhere"], ""),
    ("no path", ["data.path=null"], 1, ["data.corpus=text"], "path"),
    ("glob without match", ["data.path=corpus/*.nothing"], 1, ["data.path=corpus/*.nothing"], ""),
    ("path of python-docs", ["data.corpus=python-docs"], 1, ["data.path=corpus"], ""),
    ("corpus and blend", ["data.blend=[{corpus: text, path: corpus, weight: 1}]"], 1, ["data.blend"], ""),
    ("tokens without index", ["data.corpus=tokens"], 1, ["data.path=corpus"], ""),
    ("gpt2 without files", ["data.tokenizer=gpt2"], 1, ["data.tokenizer=gpt2"], "tokenizer_path"),
    ("bert without files", ["data.tokenizer=bert", "data.tokenizer_path=corpus"], 1, ["data.tokenizer"], ""),
    ("bytes need no path", ["data.tokenizer_path=corpus"], 1, ["data.tokenizer_path=corpus"], ""),
    ("lowercase bytes", ["data.lowercase=true"], 1, ["data.lowercase="], ""),
    ("masking in a gpt", ["data.mlm_probability=0.2"], 1, ["data.mlm_probability=0.2"], ""),
    ("hf_config without hf", ["data.hf_config=x"], 1, ["data.hf_config=x"], ""),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "world_size", "settings", "fix"), [c[1:] for c in CONTRADICTIONS],
                         ids=[c[0] for c in CONTRADICTIONS])  # fmt: skip
def test_contradictions(folder: Path, overrides: list[str], world_size: int, settings: list[str], fix: str) -> None:
    found = problems_of(folder, *overrides, world_size=world_size)
    named = [p for p in found if all(any(s.startswith(w) for s in p.settings) for w in settings)]
    assert named, found
    assert any(fix in p.fix for p in named), named


LEGAL: list[tuple[list[str], int]] = [
    (["parallel.tensor=2"], 2),
    *((["compression.codec=topk", "compression.ratio=0.1"], world) for world in (1, 2, 4)),
    (["compression.codec=powersgd", "parallel.tensor=2", "parallel.zero=2"], 4),
    *((ONE_BIT_ADAM, world) for world in (1, 2)),
    (["compression.codec=onebit_lamb", "compression.warmup_steps=9", "optim.name=lamb", "parallel.tensor=2"], 4),
    (["optim.name=lamb", "parallel.zero=3"], 2),
    (["parallel.tensor=4", "parallel.sequence=true", "parallel.recompute=full", "run.compile=true"], 8),
    (["parallel.tensor=2", "model.vocab_size=261"], 2),
    (PIPELINE, 2),
    ([*PIPELINE, "parallel.virtual_stages=1"], 2),
    (["parallel.pipeline=2", "parallel.schedule=gpipe"], 2),
    *(([*PIPELINE, "model.layers=4", f"parallel.schedule={schedule}", "parallel.virtual_stages=2"], 2)
      for schedule in ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")),
    ([*PIPELINE, "parallel.zero=3"], 4),
    ([*PIPELINE, "model.layers=4", "parallel.schedule=zbv", "parallel.zero=2"], 4),
    (["parallel.context=2"], 2),
    (["parallel.context=2", "parallel.context_method=ulysses", "parallel.tensor=2", "parallel.sequence=true"], 4),
    (["model.family=bert", "parallel.context=2", "data.sequence_length=30"], 2),
    *(([f"parallel.zero={stage}"], world) for stage in (1, 2, 3) for world in (1, 2, 4)),
    (["parallel.zero=3", "parallel.offload=true", "parallel.replicate=2", "parallel.context=2"], 8),
    (["parallel.tensor=2", *PIPELINE, "parallel.zero=2"], 8),
    ([*PIPELINE, "parallel.context=2", "parallel.zero=1"], 8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "world_size"), LEGAL, ids=lambda value: ",".join(value) if isinstance(value, list) else None
)
def test_legal_layouts(folder: Path, overrides: list[str], world_size: int) -> None:
    """A check that refuses too much would pass every test above."""
    assert problems_of(folder, *overrides, world_size=world_size) == []


def test_all_problems_of_a_layout_at_once(folder: Path) -> None:
    words = ["parallel.tensor=3", "parallel.pipeline=2", "parallel.context=5", "parallel.schedule=zbv", "parallel.zero=3",
             "parallel.virtual_stages=3"]  # fmt: skip
    found = problems_of(folder, *words, world_size=7)
    assert len(found) >= 7  # ranks, heads, features, tokens, stages held, ZeRO, layers
    named = {setting for problem in found for setting in problem.settings}
    assert set(words) <= named


def test_compiling_without_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    (problem,) = problems_of(folder, "run.compile=true")
    assert problem.settings[0] == "run.compile=true"
    assert "run.compile=false" in problem.fix


def _empty(folder: Path) -> None:
    for path in (folder / "corpus").iterdir():
        path.write_text("")


def _file_in_the_way(folder: Path) -> None:
    (folder / "runs").write_text("not a folder")


def _old_run(folder: Path) -> None:
    (folder / "runs" / "run").mkdir(parents=True)
    (folder / "runs" / "run" / "metrics.jsonl").write_text("{}\n")


def _too_small(folder: Path) -> None:
    for path in (folder / "corpus").iterdir():
        path.write_text("word ")


SITUATIONS: list[tuple[Callable[[Path], None], list[str], str]] = [
    (_empty, [], "data.path"),
    (_too_small, [], "data.sequence_length"),
    (_file_in_the_way, [], "run folder"),
    (_old_run, ["checkpoint.resume=never"], "checkpoint.resume=never"),
    (_old_run, ["checkpoint.resume=runs/other/checkpoints/step_00000001"], "checkpoint.resume=runs/other"),
]


@pytest.mark.parametrize(("arrange", "overrides", "setting"), SITUATIONS)
def test_what_is_on_the_disk(folder: Path, arrange: Callable, overrides: list[str], setting: str) -> None:
    arrange(folder)
    found = problems_of(folder, *overrides)
    assert any(s.startswith(setting) for p in found for s in p.settings), found


def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1 << 20, "total": 1 << 40, "used": 0})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    found = problems_of(folder, "model.vocab_size=50304", "model.preset=gpt2-124m", "model.max_positions=1024")
    assert any("checkpoint.keep=3" in p.settings and "GiB" in p.message for p in found), found


BAD_FILES = [
    ("a: [1", "not valid YAML"),
    ("- a\n- b\n", "a list"),
    ("just words", "a str"),
    ("model: {layers: 2}\nmodel: {layers: 3}\n", "stands twice"),
    ("model:\n\tlayers: 2\n", "not valid YAML"),
    ("", "nothing says how long"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_files(folder: Path, text: str, message: str) -> None:
    assert any(message in p.message for p in problems_of(folder, text=text))


@pytest.mark.parametrize("word", ["steps", "=3", "train.steps.=3", "train.steps.more=3", "train.steps=[1"])
def test_bad_overrides(folder: Path, word: str) -> None:
    assert problems_of(folder, word)


def test_there_are_at_least_sixty_cases() -> None:
    tables = (UNKNOWN, WRONG_VALUES, CONTRADICTIONS, SITUATIONS, BAD_FILES)
    assert sum(len(table) for table in tables) >= 60


def test_all_problems_at_once_exit_2_and_nothing_written(folder: Path) -> None:
    """Through the real command: four mistakes, four numbered problems, no traceback, no file."""
    (folder / "run.yaml").write_text(yaml.safe_dump(GOOD))
    words = ["model.heads=5", "data.path=nowhere", "train.micro_batch_size=3", "log.wandb_project=x"]
    before = sorted(p for p in folder.rglob("*"))
    for command in (
        ["check", "run.yaml", *words],
        ["train", "run.yaml", *words],
        ["train", "run.yaml", "--nproc", "2", *words],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "disttrain", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "4 problems; nothing was started" in done.stderr
        assert "Traceback" not in done.stderr
        assert all(word in done.stderr for word in words)
    assert sorted(p for p in folder.rglob("*")) == before


def test_missing_config_names_the_ones_there_are(folder: Path) -> None:
    (folder / "real.yaml").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "disttrain", "check", "reel.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "real.yaml" in done.stderr


def test_usage_errors_exit_2(folder: Path) -> None:
    for command in (["train"], ["nonsense"], ["check", "run.yaml", "--world-size", "0"]):
        done = subprocess.run(
            [sys.executable, "-m", "disttrain", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr


def test_schema_is_json(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "disttrain", "schema", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["properties"]["train"]
