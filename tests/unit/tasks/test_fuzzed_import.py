"""`disttrain import` of any folder whatever: refused with a problem, or the same model; no pickle is ever executed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from disttrain import checkpoint
from disttrain.config.problems import RefusedInput
from disttrain.config.schema import ModelConfig
from disttrain.models import build_model, hf
from disttrain.tasks import hugging_face

CONFIG = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_inner": 64,
    "n_positions": 16,
    "vocab_size": 32,
}
NAMES = ["config.json", hugging_face.SINGLE, hugging_face.INDEX]


class Bomb:
    """What a pickle may do."""

    def __reduce__(self) -> tuple:
        return (Path("executed").touch, ())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 in one file, with an index, and pickles beside it; and another model's file outside of the folder."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    folder.mkdir()
    model = ModelConfig(layers=1, hidden_size=16, heads=2, ffn_hidden_size=64, max_positions=16, vocab_size=32,
                        layer_norm_epsilon=1e-5)  # fmt: skip
    state = build_model(model, 1, torch.float32).state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in hf.written("gpt", state.__getitem__, model)}
    for path in (folder / hugging_face.SINGLE, folder.parent / "outside.safetensors"):
        save_file(tensors, path, {"format": "pt"})
    (folder / hugging_face.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, hugging_face.SINGLE)}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    return folder


ODD: list[Any] = [
    None, True, 0, -1, 3, 10**6, 10**30, 10**400, 0.5, float("nan"), "", "x", "bert", "a\x00b", "..", "/etc/passwd",
    "../outside.safetensors", "pytorch_model.bin", [], {}, [1], {"x": [1]},
]  # fmt: skip


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Path], None]:
    name, key, value = draw(st.sampled_from(NAMES)), draw(st.sampled_from(sorted(CONFIG))), draw(st.sampled_from(ODD))
    kind = draw(
        st.sampled_from(["key", "key", "key", "top", "deep", "cut", "flip", "delete", "pickle", "folder", "all"])
    )
    share, bits = draw(st.floats(0, 1)), draw(st.integers(1, 255))

    def harm(folder: Path) -> None:
        path, content = folder / name, (folder / name).read_bytes()
        at = min(int(share * len(content)), len(content) - 1)
        if kind == "key" and name != hugging_face.SINGLE:
            tree = json.loads(content)
            inside = tree.get("weight_map", tree)
            inside[key if inside is tree else sorted(inside)[at % len(inside)]] = value
            path.write_text(json.dumps(tree))
        elif kind == "key":  # the header of the tensors
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            tensor = header[sorted(header)[at % len(header)]]
            tensor[sorted(tensor)[bits % len(tensor)]] = value
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        elif kind == "folder":
            path.unlink()
            path.mkdir()
        elif kind == "delete":
            path.unlink()
        elif kind == "all":
            path.write_text(json.dumps({"weight_map": value, "model_type": value, **dict.fromkeys(CONFIG, value)}))
        else:
            changed = {"top": json.dumps(value).encode(), "deep": b"[" * 100_000, "cut": content[:at],
                       "flip": content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :],
                       "pickle": pickle.dumps(Bomb())}  # fmt: skip
            path.write_bytes(changed[kind])

    return harm


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages())
def test_a_damaged_model_is_refused_or_the_same(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "model", tmp_path / "ours"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(theirs, tmp_path / "model")
    harm(tmp_path / "model")
    try:
        hugging_face.import_model(Path("model"), Path("ours"))
    except RefusedInput as refused:
        assert all(p.settings and p.message and p.fix for p in refused.problems)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # nothing written, nothing executed
        return
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "ours"]
    assert checkpoint.damage(tmp_path / "ours" / "checkpoints" / "step_00000000") is None


def test_pickles_alone_are_refused(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(theirs, "model", ignore=shutil.ignore_patterns("model.safetensors*"))
    with pytest.raises(RefusedInput) as refused:
        hugging_face.import_model(Path("model"), Path("ours"))
    assert "pickles are not read" in refused.value.problems[0].fix
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


PACKAGE = Path(hugging_face.__file__).parents[1]


def test_nothing_from_outside_is_unpickled() -> None:
    """Pickles are what our own processes tell each other; files of checkpoints, data and models are none."""
    words = ("torch.load(", "pickle.load", "Unpickler", "np.load(", "joblib", "shelve", "yaml.unsafe", "yaml.full_load")
    found = {(path.relative_to(PACKAGE).as_posix(), word) for path in PACKAGE.rglob("*.py") for word in words
             if word in path.read_text()}  # fmt: skip
    arrays = ("data/files.py", "np.load(")
    assert found == {arrays} | {(p, "pickle.load") for p in ("data/workers.py", "hang/observer.py", "verify/ranks.py")}
    (call,) = (line for line in (PACKAGE / "data/files.py").read_text().splitlines() if "np.load(" in line)
    assert "allow_pickle=False" in call
