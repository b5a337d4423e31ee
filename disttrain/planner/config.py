"""From a config to what can be planned, and back from a plan to a config. No torch."""

import difflib
import os
from pathlib import Path

from disttrain import data
from disttrain.config.load import dump, with_values
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.config.settings import setting
from disttrain.hardware import DEVICES, GIGA, lookup
from disttrain.overview import likely_vocabulary
from disttrain.planner import space
from disttrain.planner.devices import speeds_of
from disttrain.planner.footprint import Footprint
from disttrain.planner.prediction import Predictor
from disttrain.planner.speeds import MEASURED, Speeds, read
from disttrain.verify.layouts import Layout

MOST_TIMES = 4096
"""So many times the ranks are tried where nothing fits."""


def plannable(config: Config) -> Config:
    """The config with its vocabulary as far as it is known, as one rank's. Raises RefusedInput with what the planner
    does not know about."""
    problems = []
    if config.model.source is not None:
        problems.append(Problem((setting(config, "model.source"),), "nothing is known of the operators of your own model",
                                "plan the family's model of the same size: remove model.source"))  # fmt: skip
    if config.model.head != "lm":
        problems.append(Problem((setting(config, "model.head"),), "nothing is known of the memory of a task's model",
                                "plan the language model of the same size: remove task.set"))  # fmt: skip
    if config.engine != "native":
        problems.append(Problem((setting(config, "engine"),), "only the native engine is planned for",
                                "use engine=native"))  # fmt: skip
    if config.parallel.offload:
        problems.append(Problem(("parallel.offload=true",), "nothing is known of the link to host memory",
                                "use parallel.offload=false"))  # fmt: skip
    if config.outer.method != "none":
        problems.append(Problem((setting(config, "outer.method"),), "local steps are not planned for",
                                "use outer.method=none"))  # fmt: skip
    if problems:
        raise RefusedInput(problems)
    return with_values(config, {"model.vocab_size": likely_vocabulary(config)})


def refuse_hopeless(config: Config, world: int) -> None:
    """Raises RefusedInput with what is wrong with this config under a layout that is legal, and so under every one."""
    layout = next(space.layouts(config, world), None)
    if layout is not None:
        problems = layout.problems(config)
    else:
        tried = min(space.all_axes(world), key=lambda axes: axes.data(world))
        problems = Layout(world, tried.tensor, False, tried.pipeline, "gpipe", None, tried.context).problems(config)
        problems += Layout(world).problems(config)
    if problems:
        raise RefusedInput([problem for at, problem in enumerate(problems) if problem not in problems[:at]])


def refuse_validation(config: Config, device: str, speeds: Speeds, world: int) -> None:
    """Raises RefusedInput where this machine cannot train the config's layouts on so many ranks."""
    problems = data.preflight(config)
    if speeds.unit is not None:
        problems.append(Problem((f"--device {device}", "--validate"), "layouts are trained on this machine",
                                "run `disttrain calibrate` and use --device measured"))  # fmt: skip
    elif world > speeds.ranks_per_host:
        message = f"{speeds.ranks_per_host} ranks of this host were measured"
        fix = f"run `disttrain calibrate --nproc {world}`, or use --gpus {speeds.ranks_per_host}"
        problems.append(Problem((f"--gpus {world}", "--validate"), message, fix))
    if problems:
        raise RefusedInput(problems)


def speeds_for(
    config: Config, device: str, world: int, ranks_per_host: int | None, between_gigabits: float | None
) -> Speeds:
    """Of a device of the table, of this machine (`measured`), or of a file. Raises RefusedInput."""
    if device == "measured" or device.endswith(".json") or os.sep in device:
        return _measured(config, device, ranks_per_host, between_gigabits)
    found = lookup(device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if found is None or "bf16" in found.peak else "fp32"
    if found is None:
        near = difflib.get_close_matches(device.lower(), DEVICES, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]}? There are" if near else "use one of"
        raise RefusedInput([
            Problem((f"--device {device}",), "it is not in the table of devices",
                    f"{guess} {', '.join(DEVICES)}; or measured, or a JSON file of `disttrain calibrate`")
        ])  # fmt: skip
    return speeds_of(device, precision, world, ranks_per_host or 8, between_gigabits)


def _measured(config: Config, device: str, ranks_per_host: int | None, between_gigabits: float | None) -> Speeds:
    wanted = None if config.precision == "auto" else config.precision
    speeds = read(MEASURED if device == "measured" else Path(device), wanted)
    if ranks_per_host:
        full = speeds.at_full_speed if not speeds.accelerator else ranks_per_host
        speeds = speeds._replace(ranks_per_host=ranks_per_host, at_full_speed=full)
    if between_gigabits:
        link = speeds.between._replace(bytes_per_second=between_gigabits / 8 * GIGA)
        speeds = speeds._replace(between=link)
    return speeds


def enough_ranks(config: Config, world: int, speeds: Speeds, memory_bytes: float) -> int | None:
    """The first of twice, four times, ... as many ranks on which some layout fits; None if that is a great many."""
    ranks = 2 * world
    while ranks <= MOST_TIMES * world:
        predictor = Predictor(config, ranks, speeds)
        if any(_fits(predictor.footprint, config, ranks, axes, memory_bytes) for axes in space.all_axes(ranks)):
            return ranks
        ranks *= 2
    return None


def _fits(footprint: Footprint, config: Config, world: int, axes: space.Axes, memory_bytes: float) -> bool:
    """Whether the smallest layout of these axes does: everything sharded and recomputed, one sequence at a time."""
    if space.why_not(config, world, axes):
        return False
    for cut in space.cuts(config, axes):
        count = config.train.global_batch_size // axes.data(world)
        if not space.schedule_takes(config, axes, cut, count, "full"):
            continue
        for zero, replicas in space.zero_stages(config, world, axes, cut):
            layout = space.layout_of(config, world, axes, cut, zero, replicas, 1, "full")
            if replicas == 1 and footprint.worst(layout).total <= memory_bytes:
                return True
    return False


def planned(config: Config, layout: Layout) -> str:
    """The config under a layout, as YAML that `disttrain check` accepts."""
    return dump(layout.applied(config))
