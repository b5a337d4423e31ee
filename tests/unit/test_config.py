"""Loading, overrides, derived values and round trips of a config."""

from pathlib import Path

import pytest

from disttrain import capabilities
from disttrain.config.checks import given, total_steps, validate
from disttrain.config.load import all_keys, dump, load, nearest, with_values
from disttrain.config.problems import RefusedInput
from disttrain.config.schema import Config

CONTRACT = """run.name run.dir run.seed run.deterministic model.family model.preset model.layers model.hidden_size
model.heads model.max_positions model.vocab_size model.dropout data.corpus data.path data.tokenizer
data.sequence_length train.steps train.global_batch_size train.micro_batch_size train.eval_every train.clip_grad_norm
train.label_smoothing optim.name optim.lr optim.weight_decay optim.schedule optim.warmup_steps precision engine
parallel.tensor parallel.sequence parallel.pipeline parallel.schedule parallel.context parallel.zero
parallel.replicate parallel.recompute compression.codec checkpoint.every checkpoint.keep checkpoint.resume log.wandb
log.tensorboard""".split()  # noqa: SIM905


def write(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def test_every_key_of_the_contract_exists() -> None:
    assert set(CONTRACT) <= set(all_keys())


def test_every_setting_says_what_it_is() -> None:
    schema = Config.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    bare = [key for s in sections for key, value in s.get("properties", {}).items()
            if "description" not in value and "$ref" not in value]  # fmt: skip
    assert bare == []


def test_overrides_win_and_values_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 5}\noptim: {lr: 1e-3}\n")
    config = load(
        path, ["train.steps=7", "optim.lr=3e-4", "log.wandb=true", "data.path=[a, b]", "train.clip_grad_norm=null"]
    )
    assert (config.train.steps, config.optim.lr, config.log.wandb) == (7, 3e-4, True)
    assert config.data.path == ["a", "b"]
    assert config.train.clip_grad_norm is None


def test_name_is_the_files_stem(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 5}\n")
    assert load(path).run.name == "small"
    assert load(path, ["run.name=other"]).run.name == "other"


def test_derived_values(tmp_path: Path) -> None:
    gpt = load(write(tmp_path, "model: {hidden_size: 64}\n"))
    assert (gpt.model.ffn_hidden_size, gpt.model.layer_norm_epsilon) == (256, 1e-5)
    bert = load(write(tmp_path, "model: {family: bert, ffn_hidden_size: 100}\n"))
    assert (bert.model.ffn_hidden_size, bert.model.layer_norm_epsilon) == (100, 1e-12)


def test_preset_fills_and_explicit_keys_win(tmp_path: Path) -> None:
    config = load(write(tmp_path, "model: {preset: gpt2-124m, layers: 3}\n"))
    assert (config.model.hidden_size, config.model.heads, config.model.layers) == (768, 12, 3)


def test_dump_round_trip(tmp_path: Path) -> None:
    config = load(write(tmp_path, "train: {steps: 5}\nmodel: {dropout: 0.1}\noptim: {lr: 1.0e-05}\n"))
    again = load(write(tmp_path, dump(config)))
    assert again.model_dump() == config.model_dump()


def test_a_saved_config_starts_the_same_run(tmp_path: Path) -> None:
    """config.yaml writes every default out, and none of them may count as a setting without effect."""
    saved = write(tmp_path, dump(load(write(tmp_path, "train: {steps: 5}\n"))))
    assert validate(load(saved), 1) == capabilities.missing(load(saved)) == []


def test_with_values_keeps_what_was_given(tmp_path: Path) -> None:
    config = with_values(load(write(tmp_path, "train: {steps: 5}\n")), {"model.vocab_size": 9, "precision": "fp64"})
    assert (config.model.vocab_size, config.precision) == (9, "fp64")
    assert given(config, "train.steps")
    assert given(config, "model.vocab_size")
    assert not given(config, "optim.min_lr_ratio")


def test_every_problem_at_once(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput) as caught:
        load(write(tmp_path, "train: {steps: -1, stps: 3}\nmodel: {preset: nope, layers: x}\n"), ["bad"])
    assert len(caught.value.problems) == 5


def test_nearest() -> None:
    assert nearest("train.step", all_keys()) == "train.steps"
    assert nearest("zzzzzz", all_keys()) is None


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"steps": 10}, 10),
        ({"tokens": 1000}, 2),  # 4 x 128 = 512 tokens a step
        ({"tokens": 1024}, 2),
        ({"tokens": 1025}, 3),
        ({"steps": 2, "tokens": 10_000}, 2),
        ({}, None),
    ],
)
def test_total_steps(train: dict, expected: int | None) -> None:
    config = Config.model_validate({"train": {"global_batch_size": 4, **train}, "data": {"sequence_length": 128}})
    assert total_steps(config) == expected


def test_a_good_config_has_no_problems() -> None:
    config = Config.model_validate({"train": {"steps": 10}})
    assert validate(config, 1) == validate(config, 2) == validate(config, 32) == []
