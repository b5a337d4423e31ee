"""From a config and a rank to everything a run needs: device, data, model and engine."""

import ctypes
import os
from dataclasses import dataclass

import torch

from disttrain import codec_choice, costs, engines, hardware, inputs, precision
from disttrain.config.load import with_values
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.data import Data, Prepared
from disttrain.engines import Engine
from disttrain.labelled.loading import LabelledData
from disttrain.launch import RankInfo
from disttrain.mesh import Mesh, build_mesh
from disttrain.metrics import FlopsPerSequence, energy
from disttrain.parallel import own_model, world
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import Groups, make_groups


@dataclass
class Session:
    """One rank's share of a run, ready to train. `config` is resolved: nothing in it means "default" any more.

    Codec and engine change when `compression.codec=auto` chooses anew: see `choose_again`.
    """

    config: Config
    asked: Config
    """The same but for the codec, which may be "auto" here."""
    rank: RankInfo
    mesh: Mesh
    groups: Groups
    device: torch.device
    data: Data | LabelledData
    engine: Engine
    parameters: int
    """Parameters of the whole model; tied ones count once."""
    flops: FlopsPerSequence
    device_name: str
    peak_flops: tuple[float, str] | None
    """Dense peak FLOP/s of one device in the run's precision and where the figure is from; None when unknown."""
    meter: energy.Meter | None = None
    """This rank's energy counters; None where there are none."""
    energy_source: str = ""
    """What these count, or why there are none."""
    choice: codec_choice.Choice | None = None
    """What `compression.codec=auto` compared last."""

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank reads."""
        return self.mesh.data_rank(self.rank.rank)


ONE_TASK_A_RANK = ("srun", "openmpi", "mpich")
"""Launchers that can show each rank a GPU of its own (`srun --gpus-per-task=1`), always as number 0."""


def choose_device(config: Config, rank: RankInfo) -> torch.device:
    """The device of this rank. Raises RefusedInput where there are GPUs, but not one for every local rank."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.run.device == "cpu" or (config.run.device == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus >= rank.local_world_size:
        return torch.device("cuda", rank.local_rank)
    if gpus == 1 and rank.launcher in ONE_TASK_A_RANK:
        return torch.device("cuda", 0)
    raise RefusedInput([Problem((f"run.device={config.run.device}", f"local ranks {rank.local_world_size}"),
                                f"rank {rank.rank} sees {gpus} GPUs for the {rank.local_world_size} ranks of its host",
                                "start fewer ranks, or use run.device=cpu")])  # fmt: skip


def assemble(config: Config, rank: RankInfo, prepared: Prepared) -> Session:
    """Build this rank's share of a run; all ranks call it together. Starts the process group."""
    device = choose_device(config, rank)
    _set_up_torch(config, rank, device)
    corpus = inputs.open_data(config, prepared)
    mesh = build_mesh(config.parallel, rank.world_size)
    chosen = precision.choose(config.precision, device.type)
    config = with_values(config, {
        "precision": chosen,
        "run.device": device.type,
        "data.tokenizer": prepared.tokenizer_name,
        "model.vocab_size": config.model.vocab_size or corpus.vocab_size,
        "train.micro_batch_size": config.train.micro_batch_size or config.train.global_batch_size // mesh.data_ranks,
    })  # fmt: skip
    corpus = inputs.open_data(config, prepared)
    world.start(rank, device.type, config.run.timeout_s)
    groups = make_groups(mesh, rank.rank, device.type, Traffic())
    choice = None
    if config.compression.codec == "auto" and groups.coded(config.parallel.zero).size > 1:
        choice = codec_choice.choose(config, groups, device, chosen, _first_step(config, corpus, mesh, rank))
    asked = config
    if config.compression.codec == "auto":
        config = with_values(config, {"compression.codec": choice.best.codec if choice else "none"})
    engine = engines.build(config, groups, device, chosen)
    parameters, flops = _size(config)
    name = _device_name(device)
    peak = hardware.peak_flops(name, chosen)
    meter, counted = energy.find_meter(_uuid(device), rank.local_rank)
    return Session(config, asked, rank, mesh, groups, device, corpus, engine, parameters, flops, name, peak, meter, counted,
                   choice)  # fmt: skip


def choose_again(session: Session) -> None:
    """Choose a codec anew, for the link as it is now, and give the session another engine, in its first state. All ranks
    call it together."""
    session.engine.close()
    config, device = session.asked, session.device
    chosen = precision.choose(config.precision, device.type)
    batches = _first_step(config, session.data, session.mesh, session.rank)
    session.choice = codec_choice.choose(config, session.groups, device, chosen, batches)
    session.config = with_values(config, {"compression.codec": session.choice.best.codec})
    session.engine = engines.build(session.config, session.groups, device, chosen)


def renew(session: Session) -> None:
    """Give the session another engine of the same kind, in its first state. All ranks call it together."""
    session.engine.close()
    chosen = precision.choose(session.config.precision, session.device.type)
    session.engine = engines.build(session.config, session.groups, session.device, chosen)


def _first_step(config: Config, corpus: Data | LabelledData, mesh: Mesh, rank: RankInfo) -> list[engines.Batch]:
    """This rank's micro-batches of the first step."""
    return list(corpus.micro_batches(0, mesh.data_rank(rank.rank), mesh.data_ranks))


def _size(config: Config) -> tuple[int, FlopsPerSequence]:
    """Parameters and FLOPs of a sequence: by formula, or counted for a model of the user's own."""
    model, length, recompute = config.model, config.data.sequence_length, config.parallel.recompute
    if model.source is not None:
        parameters, forward = own_model.measure(model, length)
        again = forward if recompute == "full" else 0.0
        executed, six_n = 3 * forward + again, costs.six_n_flops_per_sequence(parameters, length)
        return parameters, FlopsPerSequence(3 * forward, 3 * forward, executed, six_n, length)
    parameters = costs.parameter_count(model).total
    return parameters, FlopsPerSequence(**costs.flops_per_sequence(config), positions=length)


def _set_up_torch(config: Config, rank: RankInfo, device: torch.device) -> None:
    world.share_cores(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> bool:
    """Let glibc keep what tensors free for the next ones, which spares 10 to 70 ms of page faults a step on a CPU.

    By default every large tensor is mapped and unmapped by the kernel. Returns whether the C library is glibc.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(library.mallopt(mmap_threshold, 1 << 30) and library.mallopt(trim_threshold, 2**31 - 1))


def _uuid(device: torch.device) -> str | None:
    """NVML's name of a GPU; None for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else hardware.cpu_name()
