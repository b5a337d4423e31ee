"""Behaviour of GPT and BERT themselves: names, causality, masks, dropout, parts, losses and roles."""

import fnmatch
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.schema import ModelConfig
from disttrain.models import BERT, FAMILIES, GPT, build_model, layers
from disttrain.models.dropout import WeightDropout
from disttrain.models.layers import attend

B, S, V = 3, 12, 50


def config(family: str, **changes: Any) -> ModelConfig:
    shape = {"layers": 3, "hidden_size": 32, "heads": 4, "ffn_hidden_size": 80, "max_positions": 16, "vocab_size": V}
    return ModelConfig.model_validate({"family": family, "layer_norm_epsilon": 1e-5, **shape, **changes})


def gpt(**changes: Any) -> GPT:
    model = build_model(config("gpt", **changes), seed=0, dtype=torch.float64)
    assert isinstance(model, GPT)
    return model


def bert(**changes: Any) -> BERT:
    model = build_model(config("bert", **changes), seed=0, dtype=torch.float64)
    assert isinstance(model, BERT)
    return model


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (B, S), generator=generator)
    mask = torch.arange(S) < torch.tensor([S, S - 3, S - 6])[:, None]
    return {
        "tokens": tokens,
        "targets": torch.where((torch.rand(B, S, generator=generator) < 0.4) & mask, tokens.roll(3), -100),
        "token_types": (torch.arange(S) > 4).long().expand(B, S).contiguous(),
        "attention_mask": mask,
        "next_sentence": torch.tensor([0, 1, -100]),
        "dropout_seeds": torch.tensor([11, 12, 13]),
    }


BLOCK = ["attn_norm", "attn.qkv", "attn.out", "mlp_norm", "mlp.up", "mlp.down"]
NAMES = {
    "gpt": (["embed.tokens.weight", "embed.positions.weight"], ["head.decoder.weight"], [], ["head.norm"]),
    "bert": (
        ["embed.tokens.weight", "embed.positions.weight", "embed.token_types.weight"],
        [],
        ["embed.norm"],
        ["head.transform", "head.norm", "head.decoder", "head.pooler", "head.next_sentence"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_names_are_a_contract(family: str):
    """Checkpoints, initial weights and tensor-parallel plans go by these names."""
    embeddings, heads, embedding_norms, head_layers = NAMES[family]
    both = [*embedding_norms, *(f"blocks.{i}.{part}" for i in range(3) for part in BLOCK), *head_layers]
    expected = {*embeddings, *heads, *(f"{name}.{leaf}" for name in both for leaf in ("weight", "bias"))}
    assert set(build_model(config(family), seed=0, device="meta").state_dict()) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_matrix_has_exactly_one_tensor_parallel_role(family: str):
    model = build_model(config(family), seed=0, device="meta")
    matrices = {n.removesuffix(".weight") for n, p in model.named_parameters(remove_duplicate=False) if p.ndim == 2}
    for name in matrices:
        roles = [role for pattern, role in model.tensor_plan.items() if fnmatch.fnmatchcase(name, pattern)]
        assert len(roles) == 1, (name, roles)
    assert all(fnmatch.filter(matrices, pattern) for pattern in model.tensor_plan)
    assert set(model.tensor_plan.values()) == {"vocab", "replicate", "column", "row"}


def test_a_row_shard_of_qkv_is_a_shard_of_heads():
    """Rows [heads, 3, head_size]: half the rows are the first two of four heads, and work alone."""
    whole = gpt().blocks["0"].attn
    x = torch.randn(2, S, 32, dtype=torch.float64)
    partial = []
    for part in range(2):
        shard = layers.Attention(config("gpt"), causal=True).double()
        shard.qkv.weight = nn.Parameter(whole.qkv.weight.chunk(2)[part])
        shard.qkv.bias = nn.Parameter(whole.qkv.bias.chunk(2)[part])
        shard.out.weight = nn.Parameter(whole.out.weight.chunk(2, dim=1)[part])
        shard.out.bias = nn.Parameter(whole.out.bias / 2)
        partial.append(shard(x))
    torch.testing.assert_close(partial[0] + partial[1], whole(x), atol=1e-14, rtol=1e-12)


def test_gpt_sees_no_later_token():
    model, tokens = gpt(), batch()["tokens"]
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % V
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], atol=1e-14, rtol=0)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(-1).min() > 1e-6  # and every later position sees it


def test_bert_sees_both_sides_but_no_padding():
    model, b = bert(), batch()
    changed = {**b, "tokens": b["tokens"].clone()}
    changed["tokens"][2, S - 6 :] = 1  # padding of the third sequence
    real = b["attention_mask"]
    before = model(b["tokens"], b["token_types"], real)
    after = model(changed["tokens"], b["token_types"], real)
    torch.testing.assert_close(after.mlm[real], before.mlm[real], atol=1e-14, rtol=0)
    changed["tokens"][2, 3] = (b["tokens"][2, 3] + 1) % V
    seen = model(changed["tokens"], b["token_types"], real).mlm - before.mlm
    assert seen[2, : S - 6].abs().amax(-1).min() > 1e-6 and seen[:2].abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_acts_in_training_only(family: str):
    model = build_model(config(family, dropout=0.3), seed=0)
    plain = build_model(config(family), seed=0)
    data = batch()

    def loss(of: nn.Module) -> float:
        return sum(part.sum for part in of.loss(data).values()).item()  # pyright: ignore

    assert loss(model.train()) != loss(plain.train())
    assert loss(model.eval()) == loss(plain.eval()) == loss(plain.train())


def test_gpt_loss_is_the_sum_over_targets():
    model, b = gpt(), batch()
    for smoothing in (0.0, 0.1):
        logits = model(b["tokens"]).flatten(0, 1)
        loss = model.loss(b, smoothing)
        expected = F.cross_entropy(logits, b["targets"].flatten(), reduction="sum", label_smoothing=smoothing)
        assert set(loss) == set(model.SCORES) == {"lm"}
        torch.testing.assert_close(loss["lm"].sum, expected, rtol=1e-12, atol=0)
        assert loss["lm"].count == model.count_targets(b)["lm"] == (b["targets"] != -100).sum()


def test_bert_loss_is_the_sum_over_predicted_tokens_and_over_pairs():
    model, b = bert(), batch()
    for smoothing in (0.0, 0.1):
        logits = model(b["tokens"], b["token_types"], b["attention_mask"])
        losses = model.loss(b, smoothing)
        mlm = F.cross_entropy(
            logits.mlm.flatten(0, 1), b["targets"].flatten(), reduction="sum", label_smoothing=smoothing
        )
        nsp = F.cross_entropy(logits.nsp, b["next_sentence"], reduction="sum")  # never smoothed
        torch.testing.assert_close(losses["mlm"].sum, mlm, rtol=1e-12, atol=0)
        torch.testing.assert_close(losses["nsp"].sum, nsp, rtol=1e-12, atol=0)
        assert {name: loss.count.item() for name, loss in losses.items()} == {
            "mlm": (b["targets"] != -100).sum(),
            "nsp": 2,
        }


def test_bert_scores_count_right_predictions():
    model, b = bert(), batch()
    logits = model(b["tokens"], b["token_types"], b["attention_mask"])
    b["targets"][0] = logits.mlm[0].argmax(-1)
    b["next_sentence"] = logits.nsp.argmax(-1)
    b["next_sentence"][1] = 1 - b["next_sentence"][1]
    scores = model.scores(b)
    assert tuple(scores) == model.SCORES
    predicted = b["targets"] != -100
    assert scores["mlm_accuracy"].sum == (logits.mlm.argmax(-1) == b["targets"])[predicted].sum() >= S
    assert scores["mlm_accuracy"].count == predicted.sum()
    assert (scores["nsp_accuracy"].sum, scores["nsp_accuracy"].count) == (2, 3)


def test_bert_prepares_positions_once():
    model, b = bert(), batch()
    prepared = model.prepare_batch(b)
    assert torch.equal(
        prepared["mlm_positions"], torch.tensor([i for i, t in enumerate(b["targets"].flatten()) if t >= 0])
    )
    assert model.prepare_batch(prepared) is prepared and "mlm_positions" not in b
    assert torch.equal(model.loss(prepared)["mlm"].sum, model.loss(b)["mlm"].sum)


def test_a_micro_batch_without_masked_tokens_has_loss_zero_and_whole_gradients():
    model, b = bert(), batch()
    b["targets"] = torch.full_like(b["targets"], -100)
    losses = model.loss(b)
    assert (losses["mlm"].sum, losses["mlm"].count) == (0, 0)
    sum(loss.sum for loss in losses.values()).backward()  # pyright: ignore
    assert all(p.grad is not None for p in model.parameters())  # data parallelism waits for every gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_are_the_model_with_parts_removed(family: str):
    """Three stages, built and initialised apart, give the whole model's logits."""
    whole = build_model(config(family), seed=3, dtype=torch.float64)
    stages = []
    for keep in (["0"], ["1"], ["2"]):
        stage = build_model(config(family), seed=3, dtype=torch.float64)
        stage.blocks = nn.ModuleDict({name: block for name, block in stage.blocks.items() if name in keep})
        stage.embed = stage.embed if keep == ["0"] else None
        stage.head = stage.head if keep == ["2"] else None
        assert set(stage.state_dict()) < set(whole.state_dict())
        stages.append(stage)
    b = batch()
    side = () if family == "gpt" else (b["token_types"], b["attention_mask"])
    x: Any = b["tokens"]
    for stage in stages:
        x = stage(x, *side)
    expected = whole(b["tokens"], *side)
    torch.testing.assert_close(tuple(x) if family == "bert" else x, tuple(expected) if family == "bert" else expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_float32_under_autocast_and_close(family: str):
    model = build_model(config(family), seed=0)
    exact = model.loss(batch())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(batch())
    for name, loss in exact.items():
        assert rounded[name].sum.dtype == torch.float32
        assert rounded[name].sum.item() == pytest.approx(loss.sum.item(), rel=2e-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_plain_products_equal_fused_attention(causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch):
    """In bfloat16 on a CPU, values and gradients are within rounding of float64."""
    if causal and masked:
        with pytest.raises(ValueError, match="either"):
            attend(*torch.zeros(3, 1, 1, 2, 4), torch.ones(1, 2, dtype=torch.bool), True, None)
        return
    mask = batch()["attention_mask"] if masked else None
    qkv = torch.randn(3, B, 4, S, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).bfloat16()

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = qkv.detach().to(dtype, copy=True).requires_grad_()
        y = attend(*x, mask, causal, None)
        y.square().sum().backward()
        assert x.grad is not None
        return y.double(), x.grad.double()

    exact = run(torch.float64)
    used: list[int] = []
    plain = layers._attend_unfused
    monkeypatch.setattr(layers, "_attend_unfused", lambda *args: used.append(1) or plain(*args))
    for limit in (512, 4):  # both sides of the longest sequence that is computed so
        monkeypatch.setattr(layers, "UNFUSED_SEQUENCE", limit)
        for found, expected in zip(run(torch.bfloat16), exact, strict=True):
            assert ((found - expected).norm() / expected.norm()).item() < 0.02
    assert len(used) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_weights_are_dropped(dtype: torch.dtype):
    """Against the definition: softmax, times the factors, times V."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 16, 8, generator=generator, dtype=torch.float64).to(dtype).unbind(0)
    positions = torch.arange(16)
    dropout = WeightDropout(0.5, torch.tensor([5, 6]), torch.arange(4), positions, positions)
    weights = (query.double() @ key.double().transpose(2, 3) / 8**0.5).softmax(-1) * dropout.factors(torch.float64)
    found = attend(query, key, value, None, False, dropout).double()
    torch.testing.assert_close(found, weights @ value.double(), rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-2)


def test_dropout_without_seeds_is_refused():
    data = batch()
    del data["dropout_seeds"]
    with pytest.raises(ValueError, match="dropout_seeds"):
        build_model(config("gpt", dropout=0.3), seed=0).loss(data)


def test_unresolved_shapes_are_refused():
    for changes in ({"vocab_size": None}, {"ffn_hidden_size": None}, {"layer_norm_epsilon": None}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            build_model(config("gpt", **changes), seed=0)


def test_gpt3_175b_fits_on_the_meta_device():
    shape = {"layers": 96, "hidden_size": 12288, "heads": 96, "ffn_hidden_size": 49152, "vocab_size": 50257}
    model = build_model(config("gpt", max_positions=2048, **shape), seed=0, device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(175e9, rel=5e-3)


def test_untrained_loss_is_that_of_a_uniform_guess():
    for family in FAMILIES:
        for loss in build_model(config(family), seed=0).loss(batch()).values():
            size = 2 if loss.count == 2 else V
            assert (loss.sum / loss.count).item() == pytest.approx(math.log(size), abs=0.1)


def test_models_import_nothing_distributed():
    code = (
        "import sys, disttrain.models, disttrain.models.hf;"
        "sys.exit(any(m.startswith(('disttrain.parallel', 'disttrain.engines')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
