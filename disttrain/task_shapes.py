"""Shapes of the parameters of a task's head and of the small encoders, and their FLOPs: formulas, held to the modules by a
test (no torch).

Letters: S words, E width of a word vector, H hidden size, C labels, D directions of a recurrent network, G its gates.
"""

from math import prod

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.config.task import SMALL

Shapes = dict[str, tuple[int, ...]]
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
CHARACTERS = 256
"""Bytes of UTF-8, of which a word's characters are made; 0 pads."""
WINDOW = 3
"""Characters that a filter sees."""


def outputs(model: ModelConfig) -> int:
    """Numbers that a head gives for each sequence or token. Raises ValueError where labels are not resolved yet."""
    if model.head in ("regress", "answer"):
        return 1 if model.head == "regress" else 2
    if model.labels is None:
        raise ValueError("model.labels is not resolved yet")
    return model.labels


def embedding_size(model: ModelConfig) -> int:
    """E of a small encoder: a word's vector and what its characters add."""
    characters = model.character_channels if model.character_size else 0
    return (model.embedding_size or model.hidden_size) + characters


def width(model: ModelConfig) -> int:
    """Numbers a head reads: of each token, or of a sequence after text_cnn."""
    if model.family == "text_cnn":
        return model.channels * len(model.kernels)
    return model.hidden_size * (2 if model.family == "rnn" and model.bidirectional else 1)


def head_shapes(model: ModelConfig) -> Shapes:
    """Parameters of the head by name."""
    found: Shapes = {}
    if model.family == "gpt":
        found |= {"head.norm.weight": (model.hidden_size,), "head.norm.bias": (model.hidden_size,)}
    if model.family == "text_cnn":
        for number, kernel in enumerate(model.kernels):
            name = f"head.convolutions.filters.{number}"
            found |= {
                f"{name}.weight": (model.channels, embedding_size(model), kernel),
                f"{name}.bias": (model.channels,),
            }
    reads, gives = width(model), outputs(model)
    if model.family == "bert" and model.head in ("classify", "regress"):
        found |= {"head.pooler.weight": (reads, reads), "head.pooler.bias": (reads,)}
    if model.top_attention_heads:
        read = embedding_size(model) if model.family == "text_cnn" else reads
        found |= {"head.attention.attn.qkv.weight": (3 * read, read), "head.attention.attn.qkv.bias": (3 * read,),
                  "head.attention.attn.out.weight": (read, read), "head.attention.attn.out.bias": (read,),
                  "head.attention.norm.weight": (read,), "head.attention.norm.bias": (read,)}  # fmt: skip
    if model.crf:
        found |= {"head.field.transitions": (gives, gives), "head.field.start": (gives,), "head.field.end": (gives,)}
    return found | {"head.out.weight": (gives, reads), "head.out.bias": (gives,)}


def encoder_shapes(model: ModelConfig) -> Shapes:
    """Parameters of a small encoder by name."""
    found: Shapes = {"embed.tokens.weight": (shape_of(model).vocab_size, model.embedding_size or model.hidden_size)}
    if model.character_size:
        found["embed.characters.weight"] = (CHARACTERS, model.character_size)
        found["embed.filters.weight"] = (model.character_channels, model.character_size, WINDOW)
        found["embed.filters.bias"] = (model.character_channels,)
    for layer in range(model.layers if model.family == "rnn" else 0):
        reads, rows = (width(model) if layer else embedding_size(model)), GATES[model.cell] * model.hidden_size
        for end in ("", "_reverse")[: 1 + model.bidirectional]:
            cell = f"blocks.{layer}.cell"
            found |= {f"{cell}.weight_ih_l0{end}": (rows, reads), f"{cell}.weight_hh_l0{end}": (rows, model.hidden_size),
                      f"{cell}.bias_ih_l0{end}": (rows,), f"{cell}.bias_hh_l0{end}": (rows,)}  # fmt: skip
    return found


def elements(shapes: Shapes) -> int:
    """Numbers in all of them."""
    return sum(map(prod, shapes.values()))


def encoder_flops(model: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs of a small encoder for one sequence: 2 S for each weight of a recurrent matrix. Characters are not
    counted."""
    if model.family != "rnn":
        return 0.0
    matrices = {n: s for n, s in encoder_shapes(model).items() if n.startswith("blocks.") and "weight" in n}
    return 2.0 * sequence_length * elements(matrices)


def head_flops(model: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs of a head for one sequence: 2 for each weight, times S where it reads every token (tags, answers,
    attention and text_cnn's filters), and 4 S^2 times the width of attention. A random field's are not counted."""
    matrices = {name: shape for name, shape in head_shapes(model).items() if len(shape) > 1 and ".field." not in name}
    everywhere = {name: shape for name, shape in matrices.items() if ".filters." in name or ".attention." in name}
    rest = elements(matrices) - elements(everywhere)
    each = sequence_length if model.head in ("tag", "answer") else 1
    pairs = 4.0 * sequence_length**2 * everywhere.get("head.attention.attn.out.weight", (0,))[0]
    return 2.0 * (sequence_length * elements(everywhere) + each * rest) + pairs


def is_small(model: ModelConfig) -> bool:
    """Whether the encoder is one of the small ones."""
    return model.family in SMALL
