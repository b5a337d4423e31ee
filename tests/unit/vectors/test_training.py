"""Training goes on where it stopped and ends as if it had not; files; the command."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from disttrain.cli import app
from disttrain.config.problems import RefusedInput
from disttrain.interruption import Interruption
from disttrain.vectors.corpus import read_corpus
from disttrain.vectors.files import VECTORS, Vectors, read_vectors, write_vectors
from disttrain.vectors.schema import VectorsConfig, load_vectors
from disttrain.vectors.state import STATE, Place
from disttrain.vectors.training import VectorsDiverged, changed, train
from tests.unit.vectors.made import corpus_of, pairs_text

QUESTIONS = ": family\ncat dog red blue\n: gram1-made-up\ncat cow red green\nunknown cow red green\n"


def interrupted_after(batches: int) -> tuple[Interruption, Any]:
    """An interruption that is requested once so many batches are done, and the function that sees to it."""
    interruption, seen = Interruption(), []

    def show(place: Place, of: int) -> None:
        seen.append(place.batch)
        if len(seen) == batches:
            interruption.signal = signal.SIGINT

    return interruption, show


@pytest.mark.parametrize("method", ["skipgram", "cbow", "glove"])
def test_an_interrupted_training_ends_as_any_other(tmp_path: Path, method: str) -> None:
    own = {"batch": 20} if method == "glove" else {"batch": 64, "subsample": 0.5}
    settings = {"method": method, "size": 6, "epochs": 3, **own}
    config, corpus = corpus_of(tmp_path, pairs_text(60), name="whole", **settings)
    whole = train(config, corpus, Interruption(), lambda *_: None)
    parts = config.model_copy(update={"name": "parts"})
    starts = 0
    place = None
    while place is None:
        starts += 1
        place = train(parts, corpus, *interrupted_after(3))
    assert starts >= 3
    assert whole is not None and place.losses == whole.losses and len(place.losses) == 3
    assert (parts.folder / VECTORS).read_bytes() == (config.folder / VECTORS).read_bytes()
    again = train(parts, corpus, *interrupted_after(1))
    assert again is not None and again.losses == place.losses  # nothing is left to do


def test_other_settings_are_refused_and_never_begins_anew(tmp_path: Path) -> None:
    config, corpus = corpus_of(tmp_path, pairs_text(20), size=6, epochs=1)
    assert train(config, corpus, Interruption(), lambda *_: None)
    assert changed(config) == []
    assert changed(config.model_copy(update={"questions": "questions.txt"})) == []
    longer = config.model_copy(update={"epochs": 2, "lr": 0.5})
    (problem,) = changed(longer)
    assert problem.settings == ("epochs=2 (was 1)", "lr=0.5 (was None)")
    anew = longer.model_copy(update={"resume": "never"})
    assert changed(anew) == []
    place = train(anew, corpus, Interruption(), lambda *_: None)
    assert place is not None and len(place.losses) == 2
    assert load_vectors(config.folder / "config.yaml", ()) == anew


def test_a_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    config, corpus = corpus_of(tmp_path, pairs_text(20), size=6, lr=1e30, subsample=0.0, batch=8)
    with pytest.raises(VectorsDiverged, match="give a smaller lr"):
        train(config, corpus, Interruption(), lambda *_: None)
    assert not (config.folder / STATE).exists()


def test_the_text_format_gives_every_number_back(tmp_path: Path) -> None:
    values = (np.random.default_rng(0).normal(size=(20, 7)) * 10.0 ** np.arange(-3, 4)).astype(np.float32)
    words = [f"w{n}" for n in range(19)] + ["中文"]
    write_vectors(tmp_path / "v.txt", Vectors(tuple(words), values))
    assert (tmp_path / "v.txt").read_text().startswith("20 7\nw0 ")
    found = read_vectors(tmp_path / "v.txt")
    assert found.words == tuple(words)
    np.testing.assert_array_equal(found.values, values)


def test_a_file_without_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text("the 0.5 -1e-3\nof 2 3\n")
    found = read_vectors(tmp_path / "glove.txt")
    assert found.words == ("the", "of")
    assert found.values.tolist() == [[0.5, np.float32(-1e-3)], [2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 2\na 1 2\nb 1\n", "line 3 has 1 numbers, others 2"),
        ("2 2\na 1 x\n", "line 2 does not hold a word and numbers"),
        ("3 2\na 1 2\nb 1 2\n", "promises 3 x 2 numbers"),
        ("", "it holds no vectors"),
    ],
)
def test_files_that_are_no_vectors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(RefusedInput, match=message):
        read_vectors(tmp_path / "v.txt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Interruption, "listen", lambda self: self)
    (tmp_path / "text.txt").write_text(pairs_text(40))
    (tmp_path / "questions.txt").write_text(QUESTIONS)
    settings = {"path": "text.txt", "questions": "questions.txt", "size": 6, "epochs": 2, "min_count": 2, "batch": 32}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_the_command_trains_and_judges(folder: Path) -> None:
    done = CliRunner().invoke(app, ["vectors", "small.yaml", "seed=3"])
    assert done.exit_code == 0, done.output
    assert "2 left out" not in done.output and "epoch 2/2" in done.output
    summary = json.loads((folder / "runs/small/summary.json").read_text())
    assert summary["vocabulary"] == 11 and len(summary["losses"]) == 2
    assert summary["chance"] == pytest.approx(1 / 8)
    total = summary["analogies"][-1]
    assert (total["section"], total["asked"], total["left_out"]) == ("total", 2, 1)
    judged = CliRunner().invoke(
        app, ["vectors", "--evaluate", "runs/small", "--questions", "questions.txt", "--nearest", "cat"]
    )
    assert judged.exit_code == 0, judged.output
    assert "nearest to cat" in judged.output and "chance: 12.5000 %" in judged.output


def test_interrupting_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interruption, "requested", property(lambda self: True))
    done = CliRunner().invoke(app, ["vectors", "small.yaml"])
    assert done.exit_code == 130
    assert (folder / "runs/small" / STATE).exists() and not (folder / "runs/small" / VECTORS).exists()


@pytest.mark.parametrize(
    "words",
    [
        ["vectors"],
        ["vectors", "small.yaml", "--evaluate", "runs/small"],
        ["vectors", "small.yaml", "--questions", "questions.txt"],
        ["vectors", "--evaluate", "runs/small"],
    ],
)
def test_options_that_do_not_go_together(folder: Path, words: list[str]) -> None:
    assert CliRunner().invoke(app, words).exit_code == 2


def test_what_the_command_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*words: str) -> str:
        done = CliRunner().invoke(app, ["vectors", *words])
        assert isinstance(done.exception, RefusedInput), done.output
        return str(done.exception)

    assert "does not exist" in refusal("small.yaml", "path=nothing.txt")
    both = refusal("small.yaml", "path=nothing.txt", "questions=none.txt")
    assert "does not exist" in both and "cannot be read" in both
    assert not (folder / "runs").exists()
    write_vectors(folder / "v.txt", Vectors(("a", "b"), np.ones((2, 3), dtype=np.float32)))
    assert "--nearest c" in refusal("--evaluate", "v.txt", "--nearest", "c")
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": 29500}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    assert "by one process" in refusal("small.yaml")


def test_configs_of_the_repository() -> None:
    root = Path(__file__).parents[3]
    found = sorted((root / "configs/vectors").glob("*.yaml"))
    assert len(found) == 3
    for path in found:
        config = load_vectors(path, ())
        assert config.method == path.stem.split("_")[0] and isinstance(config, VectorsConfig)


def test_read_corpus_of_a_folder(folder: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text("a b a b\n")
    assert read_corpus(load_vectors(folder / "small.yaml", ["path=texts"])).words == ("a", "b")
