"""Bytes that each ZeRO stage really holds, by kind, against the elements of `disttrain.memory.of_stage`.

Counted are the storages of all live tensors, between two micro-batches of a step: no activation is alive there, the
first gradients are, and from the second step on the moments are too.
"""

import gc

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.memory import of_stage
from tests.parallel.test_data_parallel import BATCH, SEQUENCE, VOCAB, config_for, make_engine
from tests.parallel.test_layouts import micro_batches
from tests.ranks import run_ranks


def storages() -> dict[int, int]:
    """Bytes of every live tensor's storage, by address."""
    gc.collect()
    found: dict[int, int] = {}
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]  # no Python object until it is asked for
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage.device.type == "cpu" and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def measure(rank: int, config: Config, world: int) -> dict[str, int]:
    """Bytes of weights (sharded), of gathered copies, of gradients and of moments on this rank."""
    before = storages()
    engine = make_engine(config, rank, world)
    seen: list[dict[int, int]] = []
    engine.chunks[0].module.register_forward_pre_hook(lambda *_: seen.append(storages()))

    def since(then: dict[int, int], now: dict[int, int]) -> int:
        return sum(size for place, size in now.items() if place not in then)

    weights = since(before, storages())
    idle = storages()
    engine.step(micro_batches(engine, 1), 1, 1e-3)
    batches = sum(a.nbytes for batch in micro_batches(engine, 1) for a in batch.values())
    between = since(idle, seen[1]) - batches
    gradients = sum(p.gradient.numel() * 4 for p in engine.parameters if p.gradient is not None)
    assert gradients == 0  # all are gone after the step
    moments = since(idle, storages())
    engine.step(micro_batches(engine, 2), 2, 1e-3)
    return {"weights": weights, "between": between, "moments": moments}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_follow_the_formulas(zero: int, world: int) -> None:
    size = {"model.layers": 4, "model.hidden_size": 128, "model.ffn_hidden_size": 512, "data.sequence_length": SEQUENCE}
    batch = {"train.global_batch_size": BATCH, "train.micro_batch_size": BATCH // world // 2}
    config = with_values(config_for("gpt", precision="fp32", **size, **batch), {"parallel.zero": zero})
    assert config.model.vocab_size == VOCAB
    p = of_stage(config.model, 4, True, True, 1, world if zero else 1)
    gradients = {0: p.whole, 1: p.whole, 2: p.held, 3: p.held}[zero]
    # between two micro-batches gathered copies stay at stages 1 and 2; at stage 3 that of what is no block
    copies = {0: 0, 1: 4 * p.block + p.rest, 2: 4 * p.block + p.rest, 3: p.rest}[zero]
    buckets = p.whole if zero == 0 and world > 1 else 0  # DDP keeps its buffers
    for rank, found in enumerate(run_ranks(measure, world, config, world)):
        assert found["weights"] == pytest.approx(4 * p.held, rel=0.05), rank
        assert found["moments"] == pytest.approx(8 * p.held + 4 * buckets, rel=0.05), rank
        assert found["between"] == pytest.approx(4 * (gradients + copies), rel=0.05), rank
