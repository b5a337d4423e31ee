"""Imports go down only, torch-free modules stay so, and files stay short (design, section 3)."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "disttrain"

LAYERS: list[set[str]] = [
    {"sets"},
    {"hardware", "launch", "capabilities", "config", "interruption", "importing"},
    {"task_shapes"},
    {"parameters"},
    {"mesh", "costs", "failures", "folders", "sparsity"},
    {"stages", "deepspeed_config", "hang", "moments"},
    {"layout", "memory"},
    {"models", "data", "optim", "precision", "checkpoint_contents", "ranges"},
    {"grad_compression", "labelled"},
    {"scores"},
    {"inputs"},
    {"parallel"},
    {"engines"},
    {"checkpoint", "metrics", "loggers", "report", "codec_choice"},
    {"assembly", "preflight", "overview", "doctor", "saving", "watch", "profiling"},
    {"scoring"},
    {"header", "recorder"},
    {"trainer"},
    {"tasks", "run", "slurm_script", "vectors", "ngrams"},
    {"verify", "model_compression", "teaching"},
    {"rehearsal"},
    {"planner"},
    {"calibration"},
    {
        "local_ranks",
        "demo",
        "preparing",
        "elastic",
        "checkpoint_commands",
        "checking",
        "planning",
        "smaller",
        "finetuning",
    },
    {"compare", "calibrating", "proving"},
    {"cli", "__main__"},
]
"""Module names from the bottom; a module may import what is lower, or its own package."""

SAME_LAYER = {("launch", "config"), ("capabilities", "config"), ("hardware", "config"), ("loggers", "metrics"),
              ("report", "loggers"), ("report", "metrics"), ("optim", "config"), ("overview", "preflight"),
              ("__main__", "cli")}  # fmt: skip
"""Edges inside a layer; this list may only shrink."""

TORCH_FREE = ["hardware", "launch", "capabilities", "config.load", "config.checks", "config.describe", "mesh", "costs",
              "stages", "deepspeed_config", "layout", "memory", "data", "preflight", "overview", "loggers", "report",
              "watch", "slurm_script", "inputs", "sets", "task_shapes", "scores.judging",
              "failures", "hang.reading", "preparing", "folders", "compare.command",
              "compare.report", "planning", "planner.config", "planner.report", "planner.search", "planner.validation",
              "calibrating", "moments", "config.cleaning", "labelled.reading", "labelled.hub",
              "labelled.cleaning", "labelled.words", "labelled.subwords", "labelled.windows", "labelled.splits",
              "scores.official", "scores.perplexity", "cli", "data.augmenting",
              "vectors.command", "vectors.schema", "vectors.sampling", "vectors.huffman", "vectors.analogy",
              "ngrams.command", "ngrams.stream", "sparsity", "smaller", "importing"]  # fmt: skip

TOO_LONG: dict[str, int] = {}
"""Files that may have more than 350 lines, and how many; this list may only shrink."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(name: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert found, f"disttrain.{name} has no layer: add it to LAYERS"
    return found[0]


def imports(tree: ast.AST) -> set[str]:
    """Top-level disttrain modules that a file imports, lazily or not; TYPE_CHECKING blocks do not count."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("disttrain.")}
        if isinstance(node, ast.ImportFrom) and node.module == "disttrain":
            found |= {alias.name for alias in node.names if alias.name != "__version__"}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("disttrain."):
            found.add(node.module.split(".")[1])
    return found


def test_every_layer_is_there() -> None:
    present = {p.stem if p.parent == PACKAGE else p.parent.name for p in modules()} - {"__init__"}
    assert len(modules()) >= 30
    for name in present & {n for layer in LAYERS for n in layer}:
        layer_of(name)


def test_imports_go_down() -> None:
    wrong = []
    for path in modules():
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in sorted(imports(ast.parse(path.read_text())) - {name}) if name != "__init__" else ():
            if layer_of(target) >= layer_of(name) and (name, target) not in SAME_LAYER:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {target}, which is not below")
    assert wrong == []


def test_files_and_functions_are_short() -> None:
    long = []
    for path in modules():
        name, text = str(path.relative_to(PACKAGE)), path.read_text()
        if len(text.splitlines()) > TOO_LONG.get(name, 350):
            long.append(name)
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        long += [f"{name}: {node.name}" for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    assert long == []


def test_models_know_nothing_of_ranks() -> None:
    for path in (PACKAGE / "models").glob("*.py"):
        assert "distributed" not in path.read_text().replace("distributed training", ""), path.name


def test_no_drawer_modules() -> None:
    assert not [p for p in modules() if p.stem in ("utils", "common", "helpers", "misc")]


def test_these_import_no_torch() -> None:
    """One after the other in one process: the first that does is the one to blame."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'disttrain.{name}')\n"
        "    if 'torch' in sys.modules: sys.exit(f'disttrain.{name} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *TORCH_FREE], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    """Not a timed test: --help must not load what takes long."""
    code = (
        "import sys; sys.argv = ['disttrain', '--help']\n"
        "import disttrain.cli\n"
        "try: disttrain.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
