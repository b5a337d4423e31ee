"""`prune`, `quantize` and `measure` on a real run: what comes out trains on, and loads again with equal numbers."""

import json
from pathlib import Path

import pytest
import torch

from disttrain import checkpoint
from disttrain.config.problems import RefusedInput
from disttrain.model_compression.evaluation import held_out_scores
from disttrain.model_compression.folder import DESCRIPTION, WEIGHTS, open_folder, weights_of
from disttrain.model_compression.pruning import Pruning, prune
from disttrain.model_compression.quantization import Quantization, quantize
from disttrain.tasks.trained import load_trained
from tests.runs.conftest import Workplace

ALL = ("fp16", "bf16", "int8-dynamic", "int8-static", "kmeans")
METHODS = {
    "fp16": Quantization("fp16"),
    "bf16": Quantization("bf16"),
    "int8-dynamic": Quantization("int8-dynamic"),
    "int8-static": Quantization("int8-static", batches=2),
    "kmeans": Quantization("kmeans", bits=4, finetune_batches=2),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A trained run, runs/run."""
    place = Workplace(tmp_path_factory.mktemp("smaller"))
    place.run("train", "run.yaml")
    return place


@pytest.fixture
def run(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place.folder)
    return Path("runs/run")


def test_the_score_is_that_of_training(run: Path, place: Workplace) -> None:
    recorded = place.records("run", "eval")[-1]
    found = held_out_scores(load_trained(run))
    assert found["eval_loss"] == pytest.approx(recorded["eval_loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(recorded["perplexity"], rel=1e-6)


@pytest.mark.parametrize("method", ALL)
def test_a_quantised_folder_gives_the_same_numbers_again(run: Path, method: str, tmp_path: Path) -> None:
    out, whole = tmp_path / method, held_out_scores(load_trained(run))
    quantize(run, out, METHODS[method])
    one, other = open_folder(out), open_folder(out)
    assert held_out_scores(one.trained) == held_out_scores(other.trained)
    assert held_out_scores(one.trained)["eval_loss"] == pytest.approx(whole["eval_loss"], rel=0.1)
    assert one.method == method and one.parameters == open_folder(run).parameters
    assert one.nbytes < {"fp16": 0.55, "bf16": 0.55, "kmeans": 0.4}.get(method, 0.45) * open_folder(run).nbytes
    assert sorted(file.name for file in out.iterdir()) == ["config.yaml", DESCRIPTION, WEIGHTS]


def test_a_pruned_run_is_smaller_and_trains_on(run: Path, place: Workplace) -> None:
    place.run("prune", "runs/run", "--out", "small", "--heads", "1", "--ffn-hidden-size", "40", "--importance", "taylor",
              "--batches", "2")  # fmt: skip
    small, whole = open_folder(Path("small")), open_folder(run)
    model = small.trained.config.model
    assert (model.heads, model.head_size, model.ffn_hidden_size, small.trained.step) == (1, 16, 40, 0)
    assert small.parameters == whole.parameters - (4 * 32 * 16 + 3 * 16) - 88 * (2 * 32 + 1)
    assert small.nbytes == 4 * small.parameters
    assert len(json.loads(Path("small/pruned.json").read_text())["neurons"][0]) == 40
    place.run("train", "small/config.yaml", "run.name=tuned", "--nproc", "2", "parallel.zero=3",
              "train.micro_batch_size=4")  # fmt: skip
    began = held_out_scores(small.trained)["eval_loss"]
    assert place.records("tuned", "eval")[-1]["eval_loss"] < began


def test_zeros_stay_when_a_pruned_run_trains_on(run: Path, place: Workplace) -> None:
    place.run("prune", "runs/run", "--out", "sparse", "--sparsity", "0.75")
    before = weights_of(load_trained(Path("sparse")))
    share = [float((w == 0).double().mean()) for n, w in before.items() if n.startswith("blocks.") and w.ndim > 1]
    assert sum(share) / len(share) == pytest.approx(0.75, abs=0.1)
    place.run("train", "sparse/config.yaml", "run.name=sparser")
    after = weights_of(load_trained(Path("runs/sparser")))
    matrices = [name for name, value in before.items() if name.startswith("blocks.") and value.ndim > 1]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in matrices)
    assert any(not torch.equal(before[name], after[name]) for name in matrices)
    quantize(Path("runs/sparser"), Path("sparse-kmeans"), Quantization("kmeans"))
    coded, dense = open_folder(Path("sparse-kmeans")), weights_of(load_trained(Path("runs/sparser")))
    again = weights_of(coded.trained)
    assert all(torch.equal(again[name] == 0, dense[name] == 0) for name in matrices)


def test_the_table(run: Path, place: Workplace) -> None:
    for method in ("int8-dynamic", "fp16"):
        place.run("quantize", "runs/run", "--out", f"table-{method}", "--method", method)
    done = place.run("measure", "runs/run", "table-int8-dynamic", "table-fp16", "--out", "table", "--repeats", "3",
                     "--batch", "1", "--batch", "4", "--sequence-length", "16", "--threads", "1")  # fmt: skip
    table = json.loads(Path("table.json").read_text())
    assert (table["threads"], table["sequence_length"], table["repeats"]) == (1, 16, 3)
    assert [row["method"] for row in table["rows"]] == ["none", "int8-dynamic", "fp16"]
    for row in table["rows"]:
        assert [latency["batch"] for latency in row["latencies"]] == [1, 4]
        assert all(0 < latency["low"] <= latency["median"] <= latency["high"] for latency in row["latencies"])
        assert row["scores"]["perplexity"] == pytest.approx(
            torch.tensor(row["scores"]["eval_loss"]).exp().item(), rel=1e-4
        )
    assert [latency["ratio"] for latency in table["rows"][0]["latencies"]] == [1.0, 1.0]
    lines = Path("table.md").read_text().splitlines()
    assert len(lines) == 7 and lines[2].startswith("| runs/run | none |")
    assert "int8-dynamic" in done.stdout


def problems(refused: pytest.ExceptionInfo[RefusedInput]) -> str:
    return " ".join(word for p in refused.value.problems for word in (*p.settings, p.message))


@pytest.mark.parametrize(
    "asked, words",
    [
        (Pruning(), ["--layers", "nothing says"]),
        (Pruning(heads=3), ["--heads 3", "model.heads=2"]),
        (Pruning(heads=2), ["nothing would be removed"]),
        (Pruning(heads=1, sparsity=0.5), ["one after the other"]),
        (Pruning(sparsity=0.5, importance="taylor", batches=3), ["by their magnitude"]),
        (Pruning(heads=1, batches=3), ["need no batches"]),
        (Pruning(heads=1, scope="matrix"), ["choose single weights"]),
    ],
)
def test_pruning_that_makes_no_sense_is_refused(run: Path, asked: Pruning, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(RefusedInput) as refused:
        prune(run, tmp_path / "out", asked)
    assert all(word in problems(refused) for word in words), problems(refused)
    assert not (tmp_path / "out").exists()


def test_quantisation_that_makes_no_sense_is_refused(run: Path, place: Workplace, tmp_path: Path) -> None:
    asked = Quantization("fp16", batches=1, bits=3, finetune_batches=2, finetune_lr=1e-3)
    with pytest.raises(RefusedInput) as refused:
        quantize(run, place.folder, asked)
    assert len(refused.value.problems) == 5  # and the folder is there already
    assert "already" in problems(refused)
    for words in (
        "prune nowhere --out a --heads 1",
        "quantize nowhere --out a --method fp16",
        "measure runs/run nowhere",
        "prune runs/run --out a --sparsity 1.5",
    ):
        done = place.run(*words.split(), code=2)
        assert "nothing was started" in done.stderr


def test_damage_is_told(run: Path, tmp_path: Path) -> None:
    quantize(run, tmp_path / "out", METHODS["kmeans"])
    file = tmp_path / "out" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"\0" * 8)
    with pytest.raises(RefusedInput, match="checksum"):
        open_folder(tmp_path / "out")
    file.write_bytes(whole)
    about = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    for broken in ({**about, "method": "pickle"}, {**about, "format": 9}, {**about, "matrices": {}}, [1]):
        (tmp_path / "out" / DESCRIPTION).write_text(json.dumps(broken))
        with pytest.raises(RefusedInput, match="cannot be read"):
            open_folder(tmp_path / "out")
    assert checkpoint.checksums_of(tmp_path / "out", WEIGHTS) == about["files"]
