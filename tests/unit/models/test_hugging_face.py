"""Our models against transformers' GPT-2 and BERT with the same weights, and the mapping of names and layouts."""

import pytest
import torch
from torch import Tensor

from disttrain.config.schema import ModelConfig
from disttrain.models import BERT, GPT, build_model
from disttrain.models.hf import from_hugging_face, to_hugging_face

transformers = pytest.importorskip("transformers")

B, S, V = 3, 16, 61
SHAPE = {"layers": 2, "hidden_size": 24, "heads": 3, "ffn_hidden_size": 40, "max_positions": 20, "vocab_size": V}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = [torch.float32, torch.float64]


def gpt_config() -> ModelConfig:
    return ModelConfig(family="gpt", layer_norm_epsilon=1e-5, **SHAPE)


def bert_config() -> ModelConfig:
    return ModelConfig(family="bert", layer_norm_epsilon=1e-12, **SHAPE)


def their_gpt(dtype: torch.dtype):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=20, n_embd=24, n_layer=2, n_head=3, n_inner=40, initializer_range=0.3
    )
    return _perturbed(transformers.GPT2LMHeadModel(config).to(dtype).eval())


def their_bert(dtype: torch.dtype):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V,
        max_position_embeddings=20,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        initializer_range=0.3,
        pad_token_id=None,  # else the gradient of one embedding row is dropped
    )
    return _perturbed(transformers.BertForPreTraining(config).to(dtype).eval())


def _perturbed(model):
    """Biases and norms are 0 and 1 at first: move them, so that a swapped pair shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def our_copy(theirs, config: ModelConfig, dtype: torch.dtype) -> GPT | BERT:
    model = build_model(config, seed=0, dtype=dtype).eval()
    model.load_state_dict(from_hugging_face(config.family, theirs.state_dict(), config))
    return model


def bert_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (B, S), generator=generator)
    lengths = torch.tensor([S, S - 5, S - 9])
    mask = torch.arange(S) < lengths[:, None]
    chosen = (torch.rand(B, S, generator=generator) < 0.3) & mask
    return {
        "tokens": tokens,
        "targets": torch.where(chosen, tokens.roll(1), -100),
        "token_types": (torch.arange(S) >= 6).long().expand(B, S).contiguous(),
        "attention_mask": mask,
        "next_sentence": torch.tensor([0, 1, 1]),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt_gives_the_same_logits_loss_and_gradients(dtype: torch.dtype):
    theirs = their_gpt(dtype)
    ours = our_copy(theirs, gpt_config(), dtype)
    tokens = torch.randint(0, V, (B, S + 1), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].clone()}
    batch["targets"][0, :4] = -100
    tolerance = TOLERANCE[dtype]

    logits = theirs(batch["tokens"]).logits
    torch.testing.assert_close(ours(batch["tokens"]), logits, atol=tolerance, rtol=tolerance)

    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    found = ours.loss(batch)["lm"]
    assert found.count == B * S - 4
    torch.testing.assert_close(found.sum / found.count, expected, atol=tolerance, rtol=tolerance)
    assert_same_gradients(ours, theirs, found.sum / found.count, expected, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bert_gives_the_same_logits_loss_and_gradients(dtype: torch.dtype):
    theirs = their_bert(dtype)
    ours = our_copy(theirs, bert_config(), dtype)
    batch = bert_batch()
    tolerance = TOLERANCE[dtype]

    reference = theirs(
        batch["tokens"],
        attention_mask=batch["attention_mask"].long(),
        token_type_ids=batch["token_types"],
        labels=batch["targets"],
        next_sentence_label=batch["next_sentence"],
    )
    real = batch["attention_mask"]
    logits = ours(batch["tokens"], batch["token_types"], real)
    torch.testing.assert_close(logits.mlm[real], reference.prediction_logits[real], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logits.nsp, reference.seq_relationship_logits, atol=tolerance, rtol=tolerance)

    losses = ours.loss(batch)
    assert losses["mlm"].count == (batch["targets"] != -100).sum() and losses["nsp"].count == B
    found = losses["mlm"].sum / losses["mlm"].count + losses["nsp"].sum / losses["nsp"].count
    torch.testing.assert_close(found, reference.loss, atol=tolerance, rtol=tolerance)
    assert_same_gradients(ours, theirs, found, reference.loss, tolerance)


def assert_same_gradients(ours, theirs, our_loss: Tensor, their_loss: Tensor, tolerance: float):
    """Every gradient: theirs, by their names, go through the same mapping as weights do."""
    our_loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    mapped = from_hugging_face(ours.config.family, gradients, ours.config)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, mapped[name], atol=tolerance, rtol=10 * tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("make, config", [(their_gpt, gpt_config()), (their_bert, bert_config())])
def test_round_trip_is_exact_and_complete(make, config: ModelConfig):
    theirs = make(torch.float32).state_dict()
    ours = from_hugging_face(config.family, theirs, config)
    assert set(ours) == set(build_model(config, seed=0, device="meta").state_dict())
    back = to_hugging_face(config.family, ours, config)
    assert set(back) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name


def test_files_that_store_tied_weights_once_and_old_names_are_read():
    config = gpt_config()
    theirs = their_gpt(torch.float32).state_dict()
    expected = from_hugging_face("gpt", theirs, config)
    published = {n.removeprefix("transformer."): t for n, t in theirs.items() if n != "lm_head.weight"}
    published["h.0.attn.bias"] = torch.ones(1, 1, 20, 20)
    found = from_hugging_face("gpt", published, config)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    config = bert_config()
    theirs = their_bert(torch.float32).state_dict()
    expected = from_hugging_face("bert", theirs, config)
    published = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in theirs.items()
        if not n.startswith("cls.predictions.decoder")
    }
    found = from_hugging_face("bert", published, config)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_missing_and_unknown_names_are_listed():
    state = their_gpt(torch.float32).state_dict()
    del state["transformer.ln_f.bias"]
    state["transformer.h.0.adapter"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \['transformer.ln_f.bias'\], unknown \['transformer.h.0.adapter'\]"):
        from_hugging_face("gpt", state, gpt_config())
