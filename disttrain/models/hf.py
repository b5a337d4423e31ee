"""Names and layouts of Hugging Face's GPT-2 (`GPT2LMHeadModel`) and BERT (`BertForPreTraining`) weights.

Two differences beside names: their GPT-2 stores linear weights transposed, and both keep query, key and value as three
blocks of all heads where ours interleaves them by head ([A, 3, D] rows, see `disttrain.models.layers.Attention`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from disttrain.config.schema import Family, ModelConfig


class _Row(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    to_ours: Callable[[list[Tensor], int], Tensor]
    """(their tensors, number of heads) -> our tensor."""
    to_theirs: Callable[[Tensor, int], Iterable[Tensor]]


def from_hugging_face(family: Family, state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict for a Hugging Face one. Names that tie may be missing, as in files that store tied weights once.

    Raises ValueError listing the names that are missing or not understood.
    """
    ours = dict(read(family, state.keys(), state.__getitem__, config))
    found = {name: tensor for name, tensor in ours.items() if tensor is not None}
    if lacking := sorted(ours.keys() - found.keys()):
        raise ValueError(f"not a {family} state dict with all heads: missing {lacking}")
    return {**found, "head.decoder.weight": found["embed.tokens.weight"]}


def to_hugging_face(family: Family, state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The Hugging Face state dict for ours, tied names included. Raises KeyError for a name that is missing."""
    return _with_ties(family, dict(written(family, state.__getitem__, config)))


def written(family: Family, read: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """What a Hugging Face file holds, each tensor made when it is asked for; tied ones once, as they write it.

    `read` gives one of our parameters by name.
    """
    for row in _rows(family, config.layers):
        if row.ours == "head.decoder.weight":
            continue  # tied to the embedding
        names = [_TIES[family].get(name, name) for name in row.theirs]
        yield from zip(names, row.to_theirs(read(row.ours), config.heads), strict=True)


def read(
    family: Family, names: Collection[str], load: Callable[[str], Tensor], config: ModelConfig
) -> Iterator[tuple[str, Tensor | None]]:
    """Our parameters from a Hugging Face file with these names, each made when it is asked for; tied ones once, and None
    for those of the head that a file without one lacks.

    `load` gives one of their tensors by name. Raises ValueError listing the names that are missing or not understood.
    """
    there = {_modern(family, _prefixed(family, name)): name for name in names if not name.endswith(_BUFFERS)}
    for name, source in _TIES[family].items():
        if source in there:
            there.setdefault(name, there[source])
    rows = [row for row in _rows(family, config.layers) if row.ours != "head.decoder.weight"]
    expected = {name for row in rows for name in row.theirs} | set(_TIES[family])
    needed = [row for row in rows if family == "gpt" or not row.ours.startswith("head.")]
    missing = sorted(name for row in needed for name in row.theirs if name not in there)
    unknown = sorted(there.keys() - expected)
    if missing or unknown:
        raise ValueError(f"not a {family} of {config.layers} layers: missing {missing[:5]}, unknown {unknown[:5]}")
    for row in rows:
        if all(name in there for name in row.theirs):
            yield row.ours, row.to_ours([load(there[name]) for name in row.theirs], config.heads)
        else:
            yield row.ours, None


def _prefixed(family: str, name: str) -> str:
    """A name of `BertModel`, which has no heads and no prefix, as the models with heads have it."""
    return f"bert.{name}" if family == "bert" and name.startswith(("embeddings.", "encoder.", "pooler.")) else name


_BUFFERS = (".attn.bias", ".attn.masked_bias", ".position_ids")  # masks and indices that older files carry

_TIES: dict[str, dict[str, str]] = {
    "gpt": {"lm_head.weight": "transformer.wte.weight"},
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "cls.predictions.bias": "cls.predictions.decoder.bias",
    },
}


def _with_ties(family: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    ties = _TIES[family].items()
    return {**{name: state[source] for name, source in ties if source in state}, **state}


def _modern(family: str, name: str) -> str:
    """Today's name: the published GPT-2 files lack the prefix, the BERT ones say gamma and beta."""
    if family == "gpt" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _plain(ours: str, theirs: str) -> _Row:
    return _Row(ours, (theirs,), lambda tensors, _: tensors[0], lambda tensor, _: [tensor])


def _transposed(ours: str, theirs: str) -> _Row:
    return _Row(
        ours, (theirs,), lambda tensors, _: tensors[0].t().contiguous(), lambda tensor, _: [tensor.t().contiguous()]
    )


def _by_head(blocks: Tensor, heads: int) -> Tensor:
    """Rows [3, A, D] -> rows [A, 3, D]."""
    return blocks.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def _by_block(rows: Tensor, heads: int) -> Tensor:
    """Rows [A, 3, D] -> rows [3, A, D]."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _fused_qkv(ours: str, theirs: str) -> _Row:
    return _Row(
        ours,
        (theirs,),
        lambda tensors, heads: _by_head(tensors[0].t(), heads),
        lambda tensor, heads: [_by_block(tensor, heads).t().contiguous()],
    )


def _separate_qkv(ours: str, theirs: str) -> _Row:
    return _Row(
        ours,
        tuple(theirs.format(part) for part in ("query", "key", "value")),
        lambda tensors, heads: _by_head(torch.cat(tensors), heads),
        lambda tensor, heads: [part.clone() for part in _by_block(tensor, heads).chunk(3)],
    )


def _rows(family: str, layers: int) -> list[_Row]:
    return _gpt_rows(layers) if family == "gpt" else _bert_rows(layers)


def _gpt_rows(layers: int) -> list[_Row]:
    rows = [
        _plain("embed.tokens.weight", "transformer.wte.weight"),
        _plain("embed.positions.weight", "transformer.wpe.weight"),
        _plain("head.norm.weight", "transformer.ln_f.weight"),
        _plain("head.norm.bias", "transformer.ln_f.bias"),
        _plain("head.decoder.weight", "lm_head.weight"),
    ]
    for i in range(layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        for leaf in ("weight", "bias"):
            rows += [
                _plain(f"{ours}.attn_norm.{leaf}", f"{theirs}.ln_1.{leaf}"),
                _fused_qkv(f"{ours}.attn.qkv.{leaf}", f"{theirs}.attn.c_attn.{leaf}"),
                _transposed(f"{ours}.attn.out.{leaf}", f"{theirs}.attn.c_proj.{leaf}"),
                _plain(f"{ours}.mlp_norm.{leaf}", f"{theirs}.ln_2.{leaf}"),
                _transposed(f"{ours}.mlp.up.{leaf}", f"{theirs}.mlp.c_fc.{leaf}"),
                _transposed(f"{ours}.mlp.down.{leaf}", f"{theirs}.mlp.c_proj.{leaf}"),
            ]
    return rows


def _bert_rows(layers: int) -> list[_Row]:
    rows = [
        _plain("embed.tokens.weight", "bert.embeddings.word_embeddings.weight"),
        _plain("embed.positions.weight", "bert.embeddings.position_embeddings.weight"),
        _plain("embed.token_types.weight", "bert.embeddings.token_type_embeddings.weight"),
    ]
    for leaf in ("weight", "bias"):
        rows += [
            _plain(f"embed.norm.{leaf}", f"bert.embeddings.LayerNorm.{leaf}"),
            _plain(f"head.transform.{leaf}", f"cls.predictions.transform.dense.{leaf}"),
            _plain(f"head.norm.{leaf}", f"cls.predictions.transform.LayerNorm.{leaf}"),
            _plain(f"head.decoder.{leaf}", f"cls.predictions.decoder.{leaf}"),
            _plain(f"head.pooler.{leaf}", f"bert.pooler.dense.{leaf}"),
            _plain(f"head.next_sentence.{leaf}", f"cls.seq_relationship.{leaf}"),
        ]
    for i in range(layers):
        ours, theirs = f"blocks.{i}", f"bert.encoder.layer.{i}"
        for leaf in ("weight", "bias"):
            rows += [
                _separate_qkv(f"{ours}.attn.qkv.{leaf}", f"{theirs}.attention.self.{{}}.{leaf}"),
                _plain(f"{ours}.attn.out.{leaf}", f"{theirs}.attention.output.dense.{leaf}"),
                _plain(f"{ours}.attn_norm.{leaf}", f"{theirs}.attention.output.LayerNorm.{leaf}"),
                _plain(f"{ours}.mlp.up.{leaf}", f"{theirs}.intermediate.dense.{leaf}"),
                _plain(f"{ours}.mlp.down.{leaf}", f"{theirs}.output.dense.{leaf}"),
                _plain(f"{ours}.mlp_norm.{leaf}", f"{theirs}.output.LayerNorm.{leaf}"),
            ]
    return rows
