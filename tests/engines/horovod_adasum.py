"""Two ranks under mpirun: Adasum against its formula, and its resume. Writes what it saw to the file it is given."""

import json
import os
import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain import engines
from disttrain.config.load import with_values
from disttrain.launch import detect
from disttrain.mesh import build_mesh
from disttrain.optim import build_optimizer
from disttrain.parallel import world
from disttrain.parallel.collectives import Traffic, gather_objects
from disttrain.parallel.groups import make_groups
from disttrain.verify.batches import micro_batches
from tests.parallel.test_data_parallel import config_for, global_batch
from tests.ranks import disagreeing

CONFIG = config_for("gpt", **{"engine": "horovod", "horovod.adasum": True, "train.micro_batch_size": 2,
                              "train.clip_grad_norm": None, "optim.weight_decay": 0.0,
                              "horovod.fusion_threshold_mib": 0.0})  # fmt: skip


def make():
    groups = make_groups(build_mesh(CONFIG.parallel, 2), dist.get_rank(), "cpu", Traffic())
    return engines.build(CONFIG, groups, torch.device("cpu"), "fp64")


def step(engine, number: int):
    return engine.step(micro_batches(global_batch("gpt", number), dist.get_rank(), 2, 2), number + 1, 0.01)


def weights(engine) -> dict[str, Tensor]:
    return {p.shard.name: p.master.detach().clone() for p in engine.parameters}


def adasum(a: Tensor, b: Tensor) -> Tensor:
    """Maleki et al. 2021, equation 4."""
    dot = (a * b).sum()
    return (1 - dot / (2 * a.square().sum())) * a + (1 - dot / (2 * b.square().sum())) * b


def steps_alone(before: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """What AdamW, at its start, does to these weights with these gradients."""
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in before.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    build_optimizer(with_values(CONFIG.optim, {"lr": 0.01}), parameters.items()).step()  # pyright: ignore
    return {name: parameter.detach() - before[name] for name, parameter in parameters.items()}


def formula() -> dict:
    """How far the first update is from Adasum of what both ranks would have done alone, and from their mean."""
    engine, own = make(), {}

    def keep(moment: str) -> None:
        if moment == "clipped":
            own.update({p.shard.name: p.gradient.clone() for p in engine.parameters})

    before = weights(engine)
    engine.watch = keep
    norm = float(step(engine, 0).grad_norm)
    gathered = gather_objects({name: gradient.tolist() for name, gradient in own.items()})
    both = [{n: torch.tensor(v, dtype=torch.float64) for n, v in each.items()} for each in gathered]
    squares = [sum(float(g.square().sum()) for g in each.values()) for each in both]
    alone = [steps_alone(before, each) for each in both]
    error, plain = 0.0, 0.0
    for name, after in weights(engine).items():
        a, b = (each[name] for each in alone)
        error = max(error, float((after - before[name] - adasum(a, b)).abs().max()))
        plain = max(plain, float((after - before[name] - (a + b) / 2).abs().max()))
    return {"error": error, "from_the_mean": plain, "norm": norm, "norm_of_ranks": (sum(squares) / 2) ** 0.5,
            "apart": disagreeing(engine, "weight"), "traffic": engine.traffic()}  # fmt: skip


def resume() -> dict:
    """Whether an engine that loads step 3 goes on bit for bit as the one that saved it."""
    engine = make()
    for number in range(3):
        step(engine, number)
    saved = deepcopy(engine.state_dict())
    moments = gather_objects([m["exp_avg"].sum().item() for m in saved["optimizer"].values()])
    after = [float(step(engine, number).grad_norm) for number in (3, 4)]
    again = make()  # beside the first: one Horovod serves both
    again.load_state_dict(saved)
    repeated = [float(step(again, number).grad_norm) for number in (3, 4)]
    same = all(torch.equal(a, b) for a, b in zip(weights(engine).values(), weights(again).values(), strict=True))
    apart = disagreeing(again, "weight")
    again.close()
    return {"repeated": after == repeated and same, "moments_agree": moments[0] == moments[1], "apart": apart}


if __name__ == "__main__":
    world.start(detect(os.environ), "cpu", 120)
    found = {"formula": formula(), "resume": resume()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    world.stop()
