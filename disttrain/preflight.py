"""Everything that can be known to be wrong before a process starts or a file is written, at once. No torch."""

import importlib.util
import os
import shutil
from pathlib import Path

import yaml
from pydantic import ValidationError

from disttrain import checkpoint, inputs, layout, loggers, memory
from disttrain.config import horovod_checks
from disttrain.config.checks import checkpoints_on_disk
from disttrain.config.load import parsed
from disttrain.config.optimizer import OptimConfig
from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import no_effect, setting

FIXED_ON_RESUME = ("model", "data.tokenizer", "data.tokenizer_vocab_size", "data.lowercase", "data.sequence_length",
                   "data.corpus", "data.path", "data.blend", "run.seed", "train.global_batch_size",
                   "data.mlm_probability", "data.short_sequence_probability", "data.max_bytes",
                   "data.held_out_fraction", "data.held_out_path", "data.document", "task", "cleaning",
                   "distill")  # fmt: skip
"""Settings that a run cannot change when it goes on: the model and the order of the data."""


def problems(config: Config, world_size: int) -> list[Problem]:
    """Every reason to refuse this run on this many ranks."""
    found = [
        *layout.problems(config, world_size),
        *own_model(config),
        *_compiler(config),
        *_deepspeed(config),
        *(horovod_checks.problems(config, world_size) if config.engine == "horovod" else ()),
        *inputs.preflight(config),
        *loggers.preflight(config),
        *_run_folder(config),
        *_weights(config),
    ]
    return [problem for index, problem in enumerate(found) if problem not in found[:index]]


def own_model(config: Config) -> list[Problem]:
    """Why the user's own model cannot be used; needs torch, but only where there is one."""
    if config.model.source is None:
        if not config.model.options:
            return []
        return [Problem(("model.options", "model.source=null"), "options are for a model of your own only",
                        "remove model.options or give model.source")]  # fmt: skip
    from disttrain.parallel.own_model import problems

    return problems(config)


def run_folder(config: Config) -> Path:
    """Folder of the run."""
    return Path(config.run.dir) / config.run.name


def resume_from(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint a run starts from, None for a new run; and one line for each newer one that is damaged."""
    if config.checkpoint.resume == "never":
        return None, []
    if config.checkpoint.resume == "auto":
        return checkpoint.newest_good(run_folder(config) / "checkpoints")
    return Path(config.checkpoint.resume), []


def before(config: Config, step: int) -> tuple[Path | None, list[str]]:
    """As `resume_from`, of a run that has gone on from there to this step: the newest good checkpoint before it."""
    path, damaged = checkpoint.newest_good(run_folder(config) / "checkpoints", step)
    if path is None and config.checkpoint.resume not in ("auto", "never"):
        path = Path(config.checkpoint.resume)
    return path, damaged


def weights_from(config: Config) -> Path | None:
    """The checkpoint whose weights a new run begins with; None where it draws its own, and where there is none."""
    given = config.checkpoint.weights
    if given is None:
        return None
    path = Path(given)
    if (path / checkpoint.MANIFEST).exists():
        return path if checkpoint.damage(path) is None else None
    return checkpoint.newest_good(path / "checkpoints")[0]


def _weights(config: Config) -> list[Problem]:
    """Why a new run cannot begin with `checkpoint.weights`; one that goes on does not need them any more."""
    goes_on = config.checkpoint.resume == "auto" and checkpoint.checkpoints(run_folder(config) / "checkpoints")
    if config.checkpoint.weights is None or goes_on:
        return []
    if config.checkpoint.resume not in ("auto", "never"):
        return [no_effect(config, "checkpoint.weights", "checkpoint.resume", "checkpoint.resume=auto")]
    name, path = setting(config, "checkpoint.weights"), weights_from(config)
    if path is None:
        return [Problem((name,), "there is no good checkpoint in it",
                        "give a run, one of its checkpoints, or a model that `import` wrote")]  # fmt: skip
    if config.model.source is not None:
        return []
    wanted = memory.parameter_shapes(config.model, range(config.model.layers)) if config.model.vocab_size else {}
    try:
        there = {
            key.removeprefix("model."): s for key, s in checkpoint.shapes(path).items() if key.startswith("model.")
        }
    except ValueError as error:
        return [Problem((name,), str(error), "give another run, or another of its checkpoints")]
    compared = wanted.keys() | (there.keys() if wanted else set())
    if config.model.head != "lm":  # the head is a new one
        compared = {name for name in compared if not name.startswith("head.") or name in wanted.keys() & there.keys()}
    wrong = sorted(key for key in compared if wanted.get(key) != there.get(key))
    if not wrong:
        return []
    one = wrong[0]
    return [Problem((name, f"model.* ({len(wrong)} parameters)"),
                    f"{one} has shape {there.get(one, 'none')} there and {wanted.get(one, 'none')} here",
                    "use the model.* settings of that run's config.yaml")]  # fmt: skip


def _compiler(config: Config) -> list[Problem]:
    """torch.compile writes C++ on a CPU, and C for its launchers on a GPU: both need a compiler on this machine."""
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if not config.run.compile or found:
        return []
    return [Problem(("run.compile=true", "PATH"), "torch.compile needs a C++ compiler and there is none",
                    "install g++, set CXX, or use run.compile=false")]  # fmt: skip


def _deepspeed(config: Config) -> list[Problem]:
    if config.engine != "deepspeed" or importlib.util.find_spec("deepspeed") is not None:
        return []
    return [Problem(("engine=deepspeed",), "the package deepspeed is not installed",
                    "run launchers/install_deepspeed.sh, or use engine=native")]  # fmt: skip


def _run_folder(config: Config) -> list[Problem]:
    folder = run_folder(config)
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        fix = "use another run.dir or run.name"
        return [Problem((f"run folder {folder}",), f"{parent} is a file, not a folder", fix)]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [Problem((f"run folder {folder}",), f"{parent} is not writable", "use another run.dir")]
    return [*_resume(config, folder), *_disk(config, parent)]


def _resume(config: Config, folder: Path) -> list[Problem]:
    resume = config.checkpoint.resume
    if resume == "never":
        if (folder / "metrics.jsonl").exists():
            fix = "use another run.name, or checkpoint.resume=auto to go on with it"
            return [Problem(("checkpoint.resume=never", f"run.name={config.run.name}"),
                            f"{folder} already holds a run, which would be overwritten", fix)]  # fmt: skip
        return []
    if resume == "auto":
        return _changed(config, folder) if checkpoint.checkpoints(folder / "checkpoints") else []
    if (folder / "metrics.jsonl").exists() and Path(resume).resolve().parent.parent != folder.resolve():
        fix = "use another run.name, or checkpoint.resume=auto to go on with the run that is there"
        return [Problem((setting(config, "checkpoint.resume"), f"run.name={config.run.name}"),
                        f"{folder} already holds a run, and the checkpoint is not one of its own", fix)]  # fmt: skip
    reason = checkpoint.damage(Path(resume)) if Path(resume).is_dir() else "there is no such folder"
    if reason:
        fix = "give a folder such as runs/NAME/checkpoints/step_00000100, auto or never"
        return [Problem((setting(config, "checkpoint.resume"),), reason, fix)]
    return []


def _changed(config: Config, folder: Path) -> list[Problem]:
    """Settings of the saved run that this config would change although the run goes on."""
    try:
        saved = parsed((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    now = config.model_dump(mode="json")
    found = []
    for key in (key for key in FIXED_ON_RESUME if key.split(".")[0] in saved):  # an older run has fewer sections
        for name, (before, after) in _differences(key, _at(saved, key), _at(now, key)).items():
            if name == "model.vocab_size" and after is None:
                continue  # follows the tokenizer, which is compared itself
            found.append(Problem((f"{name}={after}", f"{folder}/config.yaml has {before}"),
                                 "the run in this folder was trained with another value and cannot go on with this one",
                                 f"use {name}={before}, or another run.name"))  # fmt: skip
    return [*found, *_other_state(config, folder, _at(saved, "optim"))]


def _other_state(config: Config, folder: Path, saved: object) -> list[Problem]:
    """Whether the optimizer can go on from what the one of the saved settings has kept."""
    try:
        before = OptimConfig.model_validate(saved or {})
    except ValidationError:
        return []
    if before.state == config.optim.state:
        return []
    kept, needed = (", ".join(state) or "nothing" for state in (before.state, config.optim.state))
    return [Problem((setting(config, "optim.name"), f"{folder}/config.yaml has optim.name={before.name}"),
                    f"the optimizer of the run in this folder keeps {kept}, and this one goes on from {needed}",
                    "use the settings of that run, or begin a new run from its weights: checkpoint.weights")]  # fmt: skip


def _at(tree: object, key: str) -> object:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _differences(key: str, before: object, after: object) -> dict[str, tuple[object, object]]:
    if isinstance(before, dict) and isinstance(after, dict):
        parts = [_differences(f"{key}.{k}", before.get(k), after[k]) for k in after]
        return {name: pair for part in parts for name, pair in part.items()}
    return {} if before == after else {key: (before, after)}


def _disk(config: Config, parent: Path) -> list[Problem]:
    """Whether the checkpoints that are kept, and the one being written, fit on the disk."""
    model = config.model
    if model.vocab_size is None or (model.head_size is None and model.hidden_size % model.heads):
        return []
    each = memory.checkpoint_bytes(config, "fp64" if config.precision == "fp64" else "fp32")
    count = checkpoints_on_disk(config)
    needed, free = each * (count + 1), shutil.disk_usage(parent).free
    if needed <= free:
        return []
    gib = 2.0**30
    return [Problem((setting(config, "checkpoint.keep"), f"run.dir={config.run.dir}"),
                    f"{count} checkpoints and one being written take {needed / gib:.1f} GiB, "
                    f"and {free / gib:.1f} GiB are free",
                    "free space, use another run.dir, or keep fewer checkpoints")]  # fmt: skip
