"""What `compression.codec=auto` predicts, and that it takes the least."""

import pytest
import torch

from disttrain.config.schema import Config
from disttrain.grad_compression.compressor import Compressor
from disttrain.parallel.codec_choice import CANDIDATES, Candidate, Choice, Speed, choose, local_shapes, predict
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import Group
from tests.parallel.test_data_parallel import config_for, make_engine
from tests.parallel.test_grad_compression import advance
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SLOW, FAST = Speed(1e-3, 1e5), Speed(1e-5, 1e12)


def config_of(**values) -> Config:
    return config_for("gpt", **{"precision": "fp32", "compression.min_elements": 100, **values})


def sent_in_a_step(rank: int, config: Config, world: int) -> tuple[float, float]:
    """Bytes that left this rank in a step, and those that are predicted."""
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, 2))
    engine.traffic()
    advance(engine, config, rank, range(2, 3))
    shapes, copied, multiple = local_shapes(config, engine.groups)
    group = engine.groups.coded(config.parallel.zero)
    predicted = predict(config, config.compression.codec, shapes, copied, multiple, group, SLOW, CPU)
    return engine.traffic().on_wire, predicted.wire_bytes


@pytest.mark.parametrize("codec", CANDIDATES)
def test_predicted_bytes_are_sent(codec: str) -> None:
    config = config_of(**{"compression.codec": codec})
    for sent, predicted in run_ranks(sent_in_a_step, 2, config, 2):
        assert predicted == pytest.approx(sent, rel=0.03)


def test_copies_are_predicted_to_travel_whole() -> None:
    """Positions, which are as large as a block here."""
    config = config_of(**{"compression.codec": "topk", "parallel.tensor": 2, "model.max_positions": 1024})
    shapes, copied = run_ranks(shapes_and_copies, 4, config, 4)[0]
    assert "embed.positions.weight" in copied
    group = Group(2, 0, (0, 1), None, Traffic())
    wire = [predict(config, "topk", shapes, left_out, 1.0, group, SLOW, CPU).wire_bytes for left_out in (copied, ())]
    assert wire[0] - wire[1] > 0.9 * 4 * shapes["embed.positions.weight"].numel()


def shapes_and_copies(rank: int, config: Config, world: int) -> tuple[dict, set]:
    shapes, copied, _ = local_shapes(config, make_engine(config, rank, world).groups)
    return dict(shapes), copied


@pytest.mark.parametrize("values", [
    {"parallel.tensor": 2}, {"parallel.pipeline": 2, "data.sequence_length": 16, "train.micro_batch_size": 2},
])  # fmt: skip
def test_shapes_are_the_engines(values: dict) -> None:
    config = config_of(**{"compression.codec": "topk", "compression.embeddings": False, **values})
    for predicted, held in run_ranks(shapes_beside_the_engines, 4, config, 4):
        assert predicted == held
        assert predicted["coded"]


def shapes_beside_the_engines(rank: int, config: Config, world: int) -> tuple[dict, dict]:
    engine = make_engine(config, rank, world)
    shapes, copied, multiple = local_shapes(config, engine.groups)
    assert multiple == 1
    assert engine._compressor is not None
    coded = Compressor(config.compression, engine._compressor.link, 0)
    coded.cover(shapes, copied)
    held = {p.shard.name: p.shard.local_shape for p in engine.parameters}
    return {"held": dict(shapes), "coded": coded.coded}, {"held": held, "coded": engine._compressor.coded}


@pytest.mark.parametrize(("speed", "whole"), [(SLOW, False), (FAST, True)])
def test_a_slow_link_gets_a_codec_and_a_fast_one_none(speed: Speed, whole: bool) -> None:
    shapes = {f"blocks.{n}.weight": torch.Size((256, 256)) for n in range(4)}
    group = Group(2, 0, (0, 1), None, Traffic())
    candidates = [predict(config_of(), codec, shapes, (), 1.0, group, speed, CPU) for codec in CANDIDATES]
    choice = Choice(2, speed, candidates)
    assert (choice.best.codec == "none") == whole
    assert choice.candidates[0].seconds == pytest.approx(4 * 4 * 256**2 / speed.bytes_per_second + speed.latency_s)
    assert all(each.coding_s > 0 for each in candidates[1:])


def test_the_least_is_taken_and_said() -> None:
    candidates = [Candidate("none", 8e6, 0.0, 0.8), Candidate("int8", 2e6, 0.1, 0.2), Candidate("topk", 1e5, 0.4, 0.01)]
    choice = Choice(2, Speed(2e-3, 1e7), candidates)
    assert choice.best.codec == "int8"
    assert choice.reason == (
        "gradient codec int8: with 80 Mbit/s and 2 ms between 2 ranks, 0.3 s a step of coding and sending, "
        "0.8 s without a codec"
    )


def chosen(rank: int, config: Config, world: int) -> Choice:
    engine = make_engine(config, rank, world)
    return choose(config, engine.groups, engine.groups.data, CPU)


def test_all_ranks_take_the_same() -> None:
    one, other = run_ranks(chosen, 2, config_of(), 2)
    assert one.candidates == other.candidates
    assert [each.codec for each in one.candidates] == list(CANDIDATES)
