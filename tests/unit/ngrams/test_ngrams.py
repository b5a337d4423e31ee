"""`disttrain ngram`: tokens of words and of bytes, perplexity per token and per word by hand, refusals, real text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import disttrain
from disttrain.cli import app
from disttrain.config.problems import RefusedInput
from disttrain.models.ngram import KneserNey
from disttrain.ngrams.schema import NgramConfig, load_ngram
from disttrain.ngrams.scoring import fit_and_score
from disttrain.ngrams.stream import make_vocabulary, read_stream

WIKITEXT = Path(disttrain.__file__).parents[2] / "shared" / "data" / "wikitext-2"


def config_of(folder: Path, train: str, held_out: str, **settings: object) -> NgramConfig:
    (folder / "train.txt").write_text(train)
    (folder / "held_out.txt").write_text(held_out)
    paths = {"path": str(folder / "train.txt"), "evaluate": [str(folder / "held_out.txt")], "dir": str(folder)}
    return NgramConfig.model_validate({**paths, **settings})


def test_words_lines_and_unknown_ones(tmp_path: Path) -> None:
    config = config_of(tmp_path, "b a b c\n\na <unk>\n", "a d\nE\n", min_count=2)
    files = [tmp_path / "train.txt"]
    vocabulary = make_vocabulary(files, config)
    assert vocabulary == {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}
    stream = read_stream(files, config, vocabulary)
    assert stream.tokens.tolist() == [3, 2, 3, 0, 1, 1, 2, 0, 1]
    assert (stream.words, stream.unknown) == (6, 1)  # c is unknown; <unk> is a known word
    held_out = read_stream([tmp_path / "held_out.txt"], config, vocabulary)
    assert held_out.tokens.tolist() == [2, 0, 1, 0, 1]
    assert (held_out.words, held_out.unknown) == (3, 2)


def test_perplexities_by_hand(tmp_path: Path) -> None:
    # Training a b a b <eos>: counts 2, 2, 1 and n1 / (n1 + 2 n2) = 1/5, vocabulary a, b, <eos>, <unk>, order 1:
    # P(a) = 1.8/5 + 0.6/5/4, P(<eos>) = 0.8/5 + 0.6/5/4.
    config = config_of(tmp_path, "a b a b\n", "a a\n", order=1, modified=False)
    (score,) = fit_and_score(config).files
    total = -2 * math.log(0.36 + 0.03) - math.log(0.16 + 0.03)
    assert (score.tokens, score.words, score.unknown_words) == (3, 2, 0)
    assert score.nats_per_token == pytest.approx(total / 3, rel=1e-13)
    assert score.perplexity_per_token == pytest.approx(math.exp(total / 3), rel=1e-13)
    assert score.perplexity_per_word == pytest.approx(math.exp(total / 2), rel=1e-13)


def test_bytes(tmp_path: Path) -> None:
    config = config_of(tmp_path, "one two\n" * 20, "two one\n", unit="bytes", order=3)
    fitted = fit_and_score(config)
    text = np.frombuffer(b"one two\n" * 20, dtype=np.uint8)
    expected = KneserNey.fit(text, 256, 3).cross_entropy(np.frombuffer(b"two one\n", dtype=np.uint8))
    (score,) = fitted.files
    assert (fitted.vocabulary, fitted.fitted_tokens) == (256, 160)
    assert (score.tokens, score.words, score.unknown_words) == (8, 2, 0)
    assert score.nats_per_token == pytest.approx(expected, rel=1e-14)
    assert score.perplexity_per_word == pytest.approx(math.exp(4 * expected), rel=1e-13)


def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    config_of(tmp_path, "a b a b\n" * 10, "a b\n")
    settings = {"path": f"{tmp_path}/train.txt", "evaluate": [f"{tmp_path}/held_out.txt"], "dir": f"{tmp_path}/runs"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    done = CliRunner().invoke(app, ["ngram", str(tmp_path / "small.yaml"), "order=7"])
    assert done.exit_code == 0, done.output
    assert "order 7, 50 tokens, vocabulary 4" in done.output
    summary = json.loads((tmp_path / "runs/small/summary.json").read_text())
    assert len(summary["gram_counts"]) == 7 and summary["files"][0]["tokens"] == 3
    assert load_ngram(tmp_path / "runs/small/config.yaml", ()).order == 7


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "a b\n", "\n\n")
    with pytest.raises(RefusedInput, match="there are no words in it"):
        fit_and_score(config)
    absent = config.model_copy(update={"path": str(tmp_path / "x"), "evaluate": [str(tmp_path / "y")]})
    with pytest.raises(RefusedInput) as refused:
        fit_and_score(absent)
    assert len(refused.value.problems) == 2
    (tmp_path / "small.yaml").write_text("path: train.txt\nevaluate: [held_out.txt]\n")
    with pytest.raises(RefusedInput) as refused:
        load_ngram(tmp_path / "small.yaml", ["unit=bytes", "lowercase=true", "min_count=3", "end=<unk>"])
    assert {problem.settings[0] for problem in refused.value.problems} == {
        "lowercase=True", "min_count=3", "end=<unk>", "unknown=<unk>"
    }  # fmt: skip
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": 29500}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    done = CliRunner().invoke(app, ["ngram", str(tmp_path / "small.yaml")])
    assert isinstance(done.exception, RefusedInput) and "by one process" in str(done.exception)


def test_the_config_of_the_repository() -> None:
    config = load_ngram(Path(__file__).parents[3] / "configs/papers/ngram_wikitext2.yaml", ())
    assert config.order == 5 and config.modified


def test_higher_orders_help_on_wikitext() -> None:
    """On a part of WikiText-2 where it is there; the whole is in docs/vectors.md."""
    if not WIKITEXT.is_dir():
        pytest.skip("no ../shared/data/wikitext-2 beside the checkout")
    settings = {"path": str(WIKITEXT / "test.txt"), "evaluate": [str(WIKITEXT / "valid.txt")]}
    scores = [fit_and_score(NgramConfig.model_validate({**settings, "order": n})).files[0] for n in (1, 3)]
    assert (scores[0].tokens, scores[0].words) == (217_646, 213_886)
    per_token = [score.perplexity_per_token for score in scores]
    assert per_token[0] > 2 * per_token[1]
    assert all(score.perplexity_per_word > score.perplexity_per_token for score in scores)
