"""Any config whatever, and any text in its place: a list of problems with their fixes, or an overview; nothing else."""

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from disttrain import checking
from disttrain.config.load import all_keys
from disttrain.config.problems import RefusedInput
from disttrain.config.schema import Config
from disttrain.failures import show_problems
from tests.unit.test_bad_input import GOOD

MOST_SECONDS = 20
"""Of one check; it takes milliseconds, so that this is a loop without an end."""

FUZZ = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Endless(BaseException):
    """A check did not end."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raises Endless inside of what takes too long."""

    def ring(number: int, frame: object) -> None:
        raise Endless

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(path: Path, words: list[str], world_size: int) -> str:
    """What `disttrain check` writes; problems must be whole, and nothing else may be raised."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    error = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")  # as Python opens them
    with redirect_stdout(out), redirect_stderr(error), bounded():
        try:
            checking.check(path, words, world_size)
        except RefusedInput as refused:
            assert refused.problems
            for problem in refused.problems:
                assert problem.settings and all(problem.settings) and problem.message and problem.fix, problem
            show_problems(refused.problems)
            return "refused"
    out.flush()
    text = out.buffer.getvalue().decode()
    assert "ranks" in text and "together" in text, text
    return "shown"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. \n" * 400)
    return tmp_path


TEXTS = [
    "", "corpus", "corpus/*", "corpus/text.txt", "nowhere/..", "~nosuchuser/x", "y" * 300, "x" * 5000, "[/red]", "[bold",
    "a\x00b", "\ud800", "model.py:Model", "null", "bert-tiny", "gpt2-124m", "gpt3-175b",
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, 4, 8, 16, 64, -1, 10**6, 10**9, 10**15, 2**63, 2**64, 10**30, 10**400, 0.0, 0.1, 0.5, 1.0, -0.5,
           1e-300, 1e30, 1e308]  # fmt: skip
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS),
    st.text(max_size=20).filter(lambda text: text[:1] not in "/~"),
)  # fmt: skip
junk = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | plain, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
keys = st.sampled_from(all_keys())


def fitting(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy:
    """Values that the schema of a setting allows, the largest too, and some that it does not."""
    if "anyOf" in schema:
        return st.one_of([fitting(option, definitions) for option in schema["anyOf"]])
    if "$ref" in schema:
        inside = definitions[schema["$ref"].rsplit("/", 1)[-1]]["properties"]
        return st.fixed_dictionaries({key: fitting(inner, definitions) for key, inner in inside.items()})
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "array":
        return st.lists(fitting(schema["items"], definitions), max_size=3)
    if kind in ("integer", "number"):
        least, most = schema.get("minimum", schema.get("exclusiveMinimum", -1)), schema.get("maximum", float("inf"))
        return st.sampled_from([n for n in NUMBERS if least <= n <= most and (kind == "number" or isinstance(n, int))])
    return {"boolean": st.booleans(), "null": st.none(), "string": st.sampled_from(TEXTS)}.get(kind or "", junk)


@st.composite
def changes(draw: st.DrawFn, values_of_any_kind: bool) -> list[tuple[str, Any]]:
    schema = Config.model_json_schema()
    found = []
    for key in draw(st.lists(keys.filter(lambda key: "." in key), max_size=5)):
        section, name = key.split(".")
        inside = schema["$defs"][schema["properties"][section]["$ref"].rsplit("/", 1)[-1]]["properties"]
        odd = values_of_any_kind and draw(st.booleans())
        found.append((key, draw(junk if odd else fitting(inside[name], schema["$defs"]))))
    return found


def changed(values: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {section: dict(inner) for section, inner in GOOD.items()}
    for key, value in values:
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return tree


def written(folder: Path, tree: dict) -> None:
    try:
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    except yaml.YAMLError:  # two keys that cannot be sorted, ...
        reject()


@FUZZ
@given(changes(values_of_any_kind=False), st.integers(1, 16))
def test_any_values_are_refused_or_shown(folder: Path, values: list, ranks: int) -> None:
    """Values that pass one by one, and meet in every combination."""
    written(folder, changed(values))
    check(folder / "run.yaml", [f"data.cache_dir={folder / 'cache'}"], ranks)
    assert sorted(p.name for p in folder.iterdir()) == ["corpus", "run.yaml"]


NAMES = ["run.dir", "run.name", "data.path", "data.held_out_path", "data.cache_dir", "data.tokenizer_path",
         "checkpoint.resume", "checkpoint.weights", "model.source"]  # fmt: skip


@pytest.mark.parametrize("key", NAMES)
def test_any_path_is_refused_or_shown(folder: Path, key: str) -> None:
    for text in TEXTS:
        values = [("data.tokenizer", "gpt2")] if key == "data.tokenizer_path" else []
        written(folder, changed([*values, ("data.cache_dir", "cache"), (key, text)]))
        check(folder / "run.yaml", [], 2)


@FUZZ
@given(changes(values_of_any_kind=True), st.dictionaries(st.sampled_from([*Config.model_fields, "modle"])
                                                         | st.text(max_size=5) | plain, junk, max_size=1))  # fmt: skip
def test_any_settings_are_refused_or_shown(folder: Path, values: list, more: dict) -> None:
    written(folder, {**changed(values), **more})
    check(folder / "run.yaml", [], 2)
    assert sorted(p.name for p in folder.iterdir()) == ["corpus", "run.yaml"]


PIECES = ["model", "run", "name", "data", "layers", ": ", ":\n  ", "\n", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "<<: ",
          "? ", "|\n", ">\n", "'", '"', "!!python/object/apply:os.system ", "!!int ", "!!float ", "!!timestamp ",
          "!!binary ", "!!set ", "!!omap ", "!!pairs ", "!x ", "2001-99-99", "2001-01-01 99:99:99", "190:20:30", "0x", "0b",
          "1_0", "1e999", ".inf", ".nan", "9" * 5000, "%YAML 9.9\n", "---\n", "...\n", "\t", "# ", "\\x00", "\x85", "\ufeff",
          "[" * 400, "{a: " * 400, "=", "~", "64", "true"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


@FUZZ
@given((texts | st.text(max_size=30)).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40),
       st.lists(texts | st.tuples(keys, texts).map("=".join), max_size=2))  # fmt: skip
def test_any_text_is_refused_or_shown(folder: Path, text: bytes, words: list[str]) -> None:
    (folder / "run.yaml").write_bytes(text)
    check(folder / "run.yaml", words, 1)
    assert sorted(p.name for p in folder.iterdir()) == ["corpus", "run.yaml"]
