"""`disttrain checkpoint` on checkpoints of one rank and of several: contents, faults by name, differences, conversion."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from disttrain import checkpoint, checkpoint_contents
from disttrain.cli import app
from disttrain.config.problems import RefusedInput
from disttrain.config.schema import Config
from tests.parallel.test_data_parallel import config_for, make_engine
from tests.parallel.test_grad_compression import advance
from tests.ranks import gathered, run_ranks

SPLIT = {"parallel.tensor": 2, "parallel.zero": 2, "compression.codec": "topk", "compression.min_elements": 100}


def saved(rank: int, config: Config, world: int, folder: Path, steps: int) -> None:
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, steps + 1))
    state = engine.state_dict()
    checkpoint.save(folder / "checkpoints", steps, state, {"step": steps, "engine": state.pop("engine")}, keep=2)


def loaded(rank: int, config: Config, world: int, path: Path) -> dict[str, torch.Tensor]:
    engine = make_engine(config, rank, world)
    state = engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    engine.load_state_dict({**state, "engine": trainer["engine"]})
    advance(engine, config, rank, range(3, 4))
    return gathered(engine, "weight")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks with two checkpoints, and one of one rank."""
    folder = tmp_path_factory.mktemp("runs")
    for steps in (1, 2):
        run_ranks(saved, 4, config_for("gpt", **SPLIT), 4, folder / "split", steps)
    run_ranks(saved, 1, config_for("gpt"), 1, folder / "one", 2)
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "runs")


def command(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_contents_are_shown(runs: Path) -> None:
    text = command("inspect", runs / "split").stdout
    assert "step 2" in text
    for section in ("model", "optimizer", "compression"):
        assert section in text
    named = command("inspect", runs / "one", "--tensors").stdout
    assert "model.blocks.0.attn.qkv.weight" in named
    assert "96 x 32" in named


def test_all_of_a_run_are_checked(runs: Path) -> None:
    assert command("verify", runs / "split").stdout.split("\n")[:2] == ["step_00000001: good", "step_00000002: good"]
    spoiled = runs / "split" / "checkpoints" / "step_00000001"
    file = sorted(spoiled.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    text = command("verify", runs / "split", code=1).stdout
    assert f"step_00000001: {file.name} has another checksum" in text
    assert "step_00000002: good" in text
    assert command("verify", runs / "split" / "checkpoints" / "step_00000002").stdout == "step_00000002: good\n"


def rewritten(folder: Path, change) -> None:
    """A file of a checkpoint with other tensors, and a manifest that knows it."""
    (file,) = folder.glob("*.safetensors")
    with checkpoint_contents_metadata(file) as metadata:
        tensors, places = load_file(file), json.loads(metadata[checkpoint_contents.PLACES])
    change(tensors, places)
    save_file(tensors, file, {**metadata, checkpoint_contents.PLACES: json.dumps(places)})
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"] |= checkpoint.checksums_of(folder, file.name)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


class checkpoint_contents_metadata:  # noqa: N801
    """A file's metadata."""

    def __init__(self, file: Path):
        from safetensors import safe_open

        self._opened = safe_open(file, framework="pt")

    def __enter__(self) -> dict:
        return self._opened.__enter__().metadata()

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)


NAME = "model.blocks.0.mlp.up.weight"


def test_what_is_missing_or_no_number_is_named(runs: Path) -> None:
    folder = runs / "one" / "checkpoints" / "step_00000002"

    def cut(tensors: dict, places: dict) -> None:
        tensors[NAME] = tensors[NAME][1:].contiguous()
        places[NAME]["saved_offsets"] = [1, 0]

    rewritten(folder, cut)
    assert command("verify", folder, code=1).stdout == f"step_00000002: not complete: {NAME}\n"
    for words in (("diff", folder, folder), ("convert", folder, runs / "whole")):
        (problem,) = command(*words, code=1).exception.problems
        assert problem.message == f"not complete: {NAME}"

    def spoil(tensors: dict, places: dict) -> None:
        tensors[NAME] = torch.zeros(64, 32)
        places[NAME]["saved_offsets"] = [0, 0]
        tensors["model.embed.tokens.weight"][3, 3] = torch.inf

    rewritten(folder, spoil)
    text = command("verify", folder, code=1).stdout
    assert text == "step_00000002: NaN or infinity in model.embed.tokens.weight\n"


def test_differences_are_named(runs: Path) -> None:
    one = runs / "one"
    assert "equal" in command("diff", one, one).stdout
    text = command("diff", runs / "split", runs / "split" / "checkpoints" / "step_00000001", code=1).stdout
    assert "tensors differ" in text
    folder = runs / "other"
    shutil.copytree(one / "checkpoints" / "step_00000002", folder)

    def change(tensors: dict, places: dict) -> None:
        tensors[NAME][0, 0] += 1e-3 * tensors[NAME].abs().max()
        del tensors["model.blocks.0.attn_norm.bias"], places["model.blocks.0.attn_norm.bias"]

    rewritten(folder, change)
    text = " ".join(command("diff", one, folder, "--tolerance", "1e-6", code=1).stdout.split())
    assert "2 of" in text
    assert "1.000e-03" in text
    assert "only in" in text


def test_whole_tensors_in_one_file_go_on_under_any_layout(runs: Path) -> None:
    before, out = runs / "split" / "checkpoints" / "step_00000002", runs / "whole"
    assert command("convert", runs / "split", out).stdout == f"written: {out}\n"
    assert len(list(out.glob("*.safetensors"))) == 1
    assert command("verify", out).stdout == "whole: good\n"
    assert "equal" in command("diff", before, out).stdout
    for world, values in ((2, {}), (4, SPLIT)):
        config = config_for("gpt", **values)
        one, other = (run_ranks(loaded, world, config, world, path)[0] for path in (before, out))
        assert one.keys() == other.keys()
        assert all(torch.equal(other[name], weight) for name, weight in one.items())
    assert isinstance(command("convert", runs / "split", out, code=1).exception, RefusedInput)
    assert not list(runs.glob("*.writing"))


@pytest.mark.parametrize("words", [("inspect", "nowhere"), ("verify", "nowhere"), ("diff", "nowhere", "nowhere"),
                                   ("convert", "nowhere", "out")])  # fmt: skip
def test_nothing_there_is_refused(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(*words, code=1)
    assert isinstance(result.exception, RefusedInput)
    assert "no checkpoint" in result.exception.problems[0].message
    assert not list(tmp_path.iterdir())
