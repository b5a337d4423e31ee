"""Checkpoints with any damage whatever: it is named, or harmless; never a traceback, never a file outside of the folder."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from disttrain import checkpoint, checkpoint_contents
from disttrain.cli import app
from disttrain.config.problems import RefusedInput
from tests.parallel.test_checkpoint import save_three
from tests.parallel.test_data_parallel import config_for
from tests.ranks import run_ranks

FUZZ = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SHARD = "shard-00001-model-00001-of-00001.safetensors"
FILES = (SHARD, checkpoint.TRAINER, checkpoint.MANIFEST)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of one process; beside it what nobody may read."""
    folder = tmp_path_factory.mktemp("made")
    run_ranks(save_three, 1, config_for("gpt", **{"model.layers": 1}), folder / "run" / "checkpoints")
    (folder / "outside.safetensors").write_bytes(
        (folder / "run" / "checkpoints" / "step_00000003" / SHARD).read_bytes()
    )
    return folder


@pytest.fixture(scope="module")
def before(made: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(made / "run" / "checkpoints" / "step_00000003")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy") / "run"


ODD: list[Any] = [
    None, True, 0, -1, 10**30, 0.5, float("nan"), float("inf"), "", "x", "a\x00b", "\ud800", ".", "/etc/passwd",
    "../outside.safetensors", "../../../../etc/passwd", [], {}, [0], [[]], [1, 2, 3], {"x": 1},
]  # fmt: skip
odd = st.sampled_from(ODD) | st.recursive(
    st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@st.composite
def byte_damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """Bits flipped, bytes cut off, added or put in the middle; a file emptied, deleted, made a folder, or another one's."""
    name, other = draw(st.sampled_from(FILES)), draw(st.sampled_from(FILES))
    kind = draw(st.sampled_from(["flip", "flip", "cut", "add", "insert", "empty", "delete", "folder", "copy", "link"]))
    share, bits, more = draw(st.floats(0, 1)), draw(st.integers(1, 255)), draw(st.binary(min_size=1, max_size=20))

    def harm(folder: Path) -> None:
        path = folder / name
        content = path.read_bytes()
        at = min(int(share * len(content)), len(content) - 1)
        changed = {
            "flip": content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :], "cut": content[:at], "empty": b"",
            "add": content + more, "insert": content[:at] + more + content[at:], "copy": (folder / other).read_bytes(),
        }  # fmt: skip
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("/nowhere")
        elif kind != "delete":
            path.write_bytes(changed[kind])

    return harm


@st.composite
def json_damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """Valid JSON with other values: at the top, a key of it, in the list of files; or nested a thousand deep."""
    name = draw(st.sampled_from([checkpoint.TRAINER, checkpoint.MANIFEST]))
    value, where = draw(odd), draw(st.sampled_from(["top", "key", "file", "file", "entry", "new", "deep"]))
    which, key = draw(st.integers(0, 3)), draw(st.sampled_from([str(o) for o in ODD if isinstance(o, str)]))

    def harm(folder: Path) -> None:
        path = folder / name
        tree = json.loads(path.read_text())
        files = tree.get("files", tree)
        if where == "deep":
            path.write_text("[" * 100_000)
            return
        if where == "key":
            tree[sorted(tree)[which % len(tree)]] = value
        elif where == "file":
            files[sorted(files)[which % len(files)]] = value
        elif where == "entry":
            files[sorted(files)[which % len(files)]] = [value, value]
        elif where == "new":
            files[key] = value
        path.write_text(json.dumps(value if where == "top" else tree))

    return harm


@st.composite
def header_damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """Other values in the header of a file of tensors, with a manifest that agrees: somebody made it on purpose."""
    value, where = (
        draw(odd),
        draw(st.sampled_from(["metadata", "places", "offsets", "entry", "shape", "dtype", "bytes"])),
    )
    which = draw(st.integers(0, 50))

    def harm(folder: Path) -> None:
        path = folder / SHARD
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        metadata = header["__metadata__"]
        places = json.loads(metadata[checkpoint_contents.PLACES])
        name = sorted(places)[which % len(places)]
        if where == "metadata":
            header["__metadata__"] = value
        elif where == "places":
            metadata[checkpoint_contents.PLACES] = json.dumps(value)
        elif where in ("offsets", "entry"):
            places[name] = {"saved_offsets": value} if where == "offsets" else value
            metadata[checkpoint_contents.PLACES] = json.dumps(places)
        else:
            header[name][{"bytes": "data_offsets"}.get(where, where)] = value
        text = json.dumps(header).encode("utf-8", "replace")
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        manifest["files"] |= checkpoint.checksums_of(folder, SHARD)
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))

    return harm


changes = byte_damages() | json_damages()

OPENED: list[str] = []
"""Files that this process opens, while it is asked to remember."""
REMEMBERS = [False]


@pytest.fixture(scope="module", autouse=True)
def remembering() -> None:
    def hook(event: str, words: tuple) -> None:
        if REMEMBERS[0] and event == "open" and isinstance(words[0], str | bytes):
            OPENED.append(str(words[0]))

    sys.addaudithook(hook)


def command(*words: str | Path) -> tuple[int, str]:
    """Exit code and output of `disttrain checkpoint`, as `failures` would give them."""
    result = CliRunner().invoke(app, ["checkpoint", *map(str, words)])
    if isinstance(result.exception, RefusedInput):
        assert all(p.settings and p.message and p.fix for p in result.exception.problems)
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@FUZZ
@given(changes)
def test_damage_is_named_or_harmless(
    run: Path, made: Path, before: dict[str, torch.Tensor], harm: Callable[[Path], None]
) -> None:
    folder = run / "checkpoints" / "step_00000003"
    reason, verified, codes = looked_at(run, made, harm)
    if reason is not None:
        assert reason and "\n" not in reason
        assert checkpoint.newest_good(run / "checkpoints") == (
            folder.with_name("step_00000002"),
            [f"{folder.name}: {reason}"],
        )
        assert verified == (1, f"{folder.name}: {reason}\n")
    else:
        assert checkpoint.newest_good(run / "checkpoints") == (folder, [])
        assert verified == (0, f"{folder.name}: good\n") and set(codes) == {0}
        loaded = checkpoint.read(folder)
        assert loaded.keys() == before.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


@FUZZ
@given(header_damages())
def test_a_header_made_on_purpose_does_no_harm(run: Path, made: Path, harm: Callable[[Path], None]) -> None:
    _, (code, said), codes = looked_at(run, made, harm)
    assert code in (0, 1) and said.count("\n") == 1, said
    assert set(codes) <= {0, 1, 2}


def looked_at(run: Path, made: Path, harm: Callable[[Path], None]) -> tuple[str | None, tuple[int, str], list[int]]:
    """The damage of the newest checkpoint, what `verify` gives, and the exit codes of the other commands."""
    good, folder = made / "run" / "checkpoints" / "step_00000003", run / "checkpoints" / "step_00000003"
    shutil.rmtree(folder)
    shutil.copytree(good, folder)
    harm(folder)
    everything = sorted(run.parent.rglob("*"))
    OPENED.clear()
    REMEMBERS[0] = True
    try:
        reason, verified = checkpoint.damage(folder), command("verify", folder)
        codes = [command(*words)[0] for words in (("inspect", "--tensors", folder), ("diff", folder, good))]
    finally:
        REMEMBERS[0] = False
    assert not [name for name in OPENED if "outside" in name or name.startswith("/etc/passwd")]
    assert sorted(run.parent.rglob("*")) == everything  # nothing written
    return reason, verified, codes
