"""The contract of every codec: shapes, promised bytes, unbiasedness where claimed, what is lost, what is not finite."""

import math
from typing import get_args

import pytest
import torch

from disttrain.codec_choice import RehearsedLink, Speed
from disttrain.config.schema import CompressionConfig, GradientCodec
from disttrain.grad_compression import carriage
from disttrain.grad_compression.codecs import CODECS, Codec
from disttrain.grad_compression.compressor import Compressor
from disttrain.grad_compression.link import Arrival
from disttrain.grad_compression.packing import pack, unpack
from disttrain.grad_compression.sparse import Threshold, largest

NAMES = [name for name in get_args(GradientCodec) if name not in ("none", "auto", "powersgd")]
ROWS, N = 3, 2048
SPEED = Speed(1e-3, 1e6)


def codec_of(name: str, **values) -> Codec:
    return CODECS[name](CompressionConfig(codec=name, **values))


def rows(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of very different sizes, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, N, generator=generator, dtype=torch.float64)
    return (x * torch.logspace(-4, 0, N, dtype=torch.float64)).to(dtype)


def through(codec: Codec, x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    code = codec.encode(x.clone(), torch.Generator().manual_seed(seed), False)
    return codec.decode(code, x.shape[1], x.dtype, torch.Generator().manual_seed(seed))


def test_all_are_in_the_table() -> None:
    assert set(NAMES) == set(CODECS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_shape_type_and_promised_bytes(name: str, dtype: torch.dtype) -> None:
    codec, x = codec_of(name), rows(dtype=dtype)
    x = x[:1] if isinstance(codec, Threshold) else x
    code = codec.encode(x, torch.Generator().manual_seed(1), False)
    assert N % codec.block == 0
    bytes_of_a_row = code.nbytes // len(x) // (dtype.itemsize // 4 if codec.carried == "sum" else 1)
    assert bytes_of_a_row == codec.nbytes(N) if codec.fixed else bytes_of_a_row <= codec.nbytes(N)
    assert codec.nbytes(N) < 4 * N
    back = codec.decode(code, N, dtype, torch.Generator().manual_seed(1))
    assert (back.shape, back.dtype) == (x.shape, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_smaller_than_what_went_in(name: str) -> None:
    """Which error feedback needs: a contraction (Karimireddy et al. 2019, assumption A), of the whole or in the mean."""
    codec, x = codec_of(name, error_feedback=True), rows()
    x = x[:1] if isinstance(codec, Threshold) else x
    lost = [float((x - through(codec, x, seed)).square().sum() / x.square().sum()) for seed in range(20)]
    limit = {"fp16": 1e-6, "bf16": 1e-5, "int8": 1e-3, "int4": 0.1}.get(name, 1.0)
    assert 0 < sum(lost) / len(lost) < limit


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_decoded_and_lost_are_the_input(name: str, feedback: bool) -> None:
    codec, x = codec_of(name, error_feedback=feedback), rows(dtype=torch.float64)
    x = x[:1] if isinstance(codec, Threshold) else x
    left = x.clone()
    code = codec.encode(left, torch.Generator().manual_seed(5), True)
    decoded = codec.decode(code, N, torch.float64, torch.Generator().manual_seed(5))
    torch.testing.assert_close(decoded + left, x, rtol=0, atol=1e-14 * float(decoded.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_unbiased_where_claimed(name: str) -> None:
    codec, x = codec_of(name, error_feedback=False), rows()
    x = x[:1] if isinstance(codec, Threshold) else x[:, :2000] if name == "randomk" else x
    draws = 1000 if name == "randomk" else 100
    outcomes = [through(codec, x, seed) for seed in range(draws)]
    mean = sum(outcomes) / draws
    spread = (sum((o - mean).square() for o in outcomes) / draws).sqrt()
    error = (mean - x).norm() / x.norm()
    if codec.unbiased:
        assert float(error) < 3 * float(spread.norm() / x.norm()) / math.sqrt(draws)
    assert codec.unbiased == (name in ("int8", "int4", "qsgd", "randomk"))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_generator_gives_the_same_code(name: str) -> None:
    codec, x = codec_of(name, error_feedback=False), rows()[:1]
    codes = [codec.encode(x.clone(), torch.Generator().manual_seed(seed), False) for seed in (1, 1, 2)]
    assert torch.equal(codes[0], codes[1])
    drawn = name in ("int8", "int4", "qsgd", "randomk")
    assert torch.equal(codes[0], codes[2]) != drawn


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_not_finite_stays_so(name: str, value: float) -> None:
    """The compressor makes a whole vector NaN when one element is not finite; that much every codec must tell."""
    codec = codec_of(name)
    x = torch.full((1, N), math.nan)
    assert not through(codec, x).isfinite().all()
    if name not in ("randomk", "threshold", "sign"):
        x = rows()[:1]
        x[0, 700] = value
        assert not through(codec, x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name: str) -> None:
    codec = codec_of(name)
    assert torch.equal(through(codec, torch.zeros(1, N)), torch.zeros(1, N))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    packed = pack(codes, bits)
    assert packed.shape == (3, 64 * bits // 8)
    assert torch.equal(unpack(packed, bits, 64), codes)


def test_quantisers_by_hand() -> None:
    x = torch.zeros(1, 256)
    x[0, :4] = torch.tensor([127.0, -127.0, 1.0, 0.5])
    back = through(codec_of("int8"), x)
    assert back[0, :3].tolist() == pytest.approx([127.0, -127.0, 1.0], rel=1e-6)
    assert round(float(back[0, 3])) in (0, 1)


def test_signs_by_hand() -> None:
    x = torch.cat([torch.full((512,), 3.0), torch.full((512,), -1.0)]).view(1, -1)
    assert torch.equal(
        through(codec_of("sign"), x), torch.cat([torch.full((512,), 2.0), torch.full((512,), -2.0)])[None]
    )


def test_top_k_by_hand() -> None:
    x = torch.zeros(1, 300)
    x[0, [7, 90, 200]] = torch.tensor([-4.0, 2.0, 1.0])
    kept = through(codec_of("topk"), x)
    assert kept[0].nonzero().flatten().tolist() == [7, 90, 200]
    assert kept[0, 7] == -4.0


def test_threshold_by_hand() -> None:
    x = torch.ones(1, 100)
    x[0, 5] = 20.0  # the root mean square is 2.23
    assert through(codec_of("threshold"), x)[0].nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("values", ["normal", "heavy", "half zeros", "mostly zeros", "equal", "not finite", "last"])
@pytest.mark.parametrize("n", [10, 5000, 100_000])
def test_the_largest_are_those_of_topk(values: str, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator).abs()
    match values:
        case "heavy":
            x = x.pow(8)
        case "half zeros" | "mostly zeros":
            x[torch.rand(n, generator=generator) < (0.5 if values == "half zeros" else 0.999)] = 0.0
        case "equal":
            x.fill_(2.0)
        case "not finite":
            x[::7], x[::1001] = math.inf, math.nan
        case "last":
            x[-n // 50 :] += 100.0
    for count in (1, n // 100 or 1, n // 2):
        found = largest(x, count)
        assert len(found.unique()) == count
        torch.testing.assert_close(x[found].sort().values, x.topk(count).values.flip(0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "messages"), [("topk", 1), ("threshold", 2)])
def test_lengths_are_sent_where_they_differ_only(name: str, messages: int) -> None:
    link, codec = RehearsedLink(2, 0, SPEED, torch.device("cpu")), codec_of(name)
    vectors = [rows(seed)[0] for seed in range(3)]
    sums, _ = carriage.carry(codec, vectors, link, _unused, _unused, lost=False)
    assert link.latencies == messages
    for sum_, x in zip(sums, vectors, strict=True):
        torch.testing.assert_close(sum_, 2 * through(codec, x.unsqueeze(0))[0])


def _unused(number: int) -> torch.Generator:
    return torch.Generator()


class Lagging(RehearsedLink):
    """A link to oneself and nobody else on which what was sent comes when it is asked for, and not before."""

    def __init__(self) -> None:
        super().__init__(1, 0, SPEED, torch.device("cpu"))
        self.sent: list[str] = []

    def gather(self, tensor: torch.Tensor) -> Arrival:
        return self._later("gather", tensor.unsqueeze(0))

    def exchange(self, rows: torch.Tensor) -> Arrival:
        return self._later("exchange", rows)

    def _later(self, name: str, tensor: torch.Tensor) -> Arrival:
        number = sum(entry.split()[0] == name and "came" not in entry for entry in self.sent)
        self.sent.append(f"{name} {number}")

        def arrive() -> torch.Tensor:
            self.sent.append(f"{name} {number} came")
            return tensor.clone()

        return arrive


def test_halves_are_added_on_the_way_where_nothing_is_fed_back() -> None:
    x = torch.randn(100, 70, generator=torch.Generator().manual_seed(1))
    for feedback, messages in ((False, 1), (True, 2)):
        link = RehearsedLink(1, 0, SPEED, torch.device("cpu"))
        config = CompressionConfig(codec="bf16", min_elements=1, error_feedback=feedback)
        compressor, gradient = Compressor(config, link, 0), x.clone()
        compressor.cover({"weight": x.shape}, ())
        compressor.begin(1, 1.0, may_skip=False)
        compressor.sum_([("weight", gradient)])
        assert torch.equal(gradient, x.bfloat16().float())
        assert link.latencies == messages


def test_one_piece_travels_while_the_next_is_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriage, "PIECE_BYTES", 2 * 256)
    link, x = Lagging(), torch.randn(700, generator=torch.Generator().manual_seed(1))
    (sum_,), _ = carriage.carry(codec_of("bf16"), [x.clone()], link, _unused, _unused, lost=True)
    assert torch.equal(sum_, x.bfloat16().float())
    assert link.sent == [
        "exchange 0",
        "exchange 1", "exchange 0 came", "gather 0",
        "exchange 2", "exchange 1 came", "gather 1", "gather 0 came",
        "exchange 2 came", "gather 2", "gather 1 came",
        "gather 2 came",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if codec_of(name).carried == "exchange"])
def test_pieces_lose_what_comes_later(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came through and what is kept is what was put in, however many pieces there are."""
    codec, x = codec_of(name), rows(dtype=torch.float64)
    monkeypatch.setattr(carriage, "PIECE_BYTES", codec.nbytes(codec.block))

    def drawn(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number + 10)

    sums, lost = carriage.carry(
        codec, list(x.clone()), RehearsedLink(1, 0, SPEED, torch.device("cpu")), drawn, drawn, lost=True
    )
    for sum_, left, row in zip(sums, lost, x, strict=True):
        torch.testing.assert_close(sum_ + left, row, rtol=0, atol=1e-12)
