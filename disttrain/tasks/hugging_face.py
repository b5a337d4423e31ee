"""`disttrain export` and `import`: GPT-2 and BERT models of Hugging Face, one tensor at a time, so that a model needs no
more memory than its largest file.

What is written loads with ``GPT2LMHeadModel`` or ``BertForPreTraining`` and ``AutoTokenizer``. What is imported is the
folder of a run of step 0: `sample`, `checkpoint` and `export` take it, and `checkpoint.weights` begins a run with it.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from disttrain import checkpoint, checkpoint_contents, data
from disttrain.config.presets import shape_of
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config, Family, ModelConfig
from disttrain.data import Tokenizer
from disttrain.models import hf, initial_value
from disttrain.tasks.trained import trained_checkpoint

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TYPES: dict[str, Family] = {"gpt2": "gpt", "bert": "bert"}
"""`model_type` of a config.json, and our family."""
UNLIKE: dict[str, tuple[tuple[str, Any], ...]] = {
    "gpt": (("activation_function", "gelu_new"), ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
            ("reorder_and_upcast_attn", False), ("add_cross_attention", False), ("tie_word_embeddings", True)),
    "bert": (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False),
             ("add_cross_attention", False), ("type_vocab_size", 2), ("tie_word_embeddings", True)),
}  # fmt: skip
"""Keys of a config.json that must be what our model does, which is also what they are when not given."""


def export(run: Path, out: Path) -> list[Path]:
    """Write the newest good checkpoint of a run as a Hugging Face model; the files. Raises RefusedInput."""
    config, path = trained_checkpoint(run)
    if config.model.source is not None:
        raise RefusedInput([Problem((f"model.source={config.model.source}",), "transformers has no such model",
                                    "export a model of one of the families")])  # fmt: skip
    if shape_of(config.model).attention_size != config.model.hidden_size:
        settings = (f"model.heads={config.model.heads}", f"model.head_size={config.model.head_size}")
        raise RefusedInput([Problem(settings, "transformers' models have heads that are as wide as the model together",
                                    "export the run from which the heads were pruned")])  # fmt: skip
    _refuse_used(out)
    tokenizer_json = data.prepare(config).tokenizer
    tokenizer = data.load_tokenizer(tokenizer_json)
    held = checkpoint_contents.entries(path)

    def ours(name: str) -> Tensor:
        found = checkpoint_contents.tensor(held[f"model.{name}"])
        return found.float() if found.dtype == torch.float64 else found

    with checkpoint_contents.appearing(out) as writing:
        _write_weights(hf.written(config.model.family, ours, config.model), writing)
        (writing / "config.json").write_text(json.dumps(_their_config(config.model, tokenizer), indent=2))
        shutil.copyfile(tokenizer_json, writing / "tokenizer.json")
        (writing / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(config.model, tokenizer), indent=2))
    return sorted(out.iterdir())


def _write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """model.safetensors, or several files and their index."""
    places: list[list[str]] = []
    total = 0
    for held in checkpoint_contents.in_files(tensors):
        save_file(held, folder / f"part{len(places)}", {"format": "pt"})
        places.append(list(held))
        total += sum(tensor.nbytes for tensor in held.values())
    count = len(places)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    for number, file in enumerate(files):
        (folder / f"part{number}").rename(folder / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, places, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _their_config(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    shared = {"vocab_size": model.vocab_size, "tie_word_embeddings": True, "pad_token_id": tokenizer.pad}
    if model.family == "gpt":
        end = tokenizer.end_of_text
        return {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": model.max_positions,
            "n_embd": model.hidden_size, "n_layer": model.layers, "n_head": model.heads, "n_inner": model.ffn_hidden_size,
            "activation_function": "gelu_new", "layer_norm_epsilon": model.layer_norm_epsilon,
            "resid_pdrop": model.dropout, "embd_pdrop": model.dropout, "attn_pdrop": model.dropout,
            "bos_token_id": end, "eos_token_id": end, **shared,
        }  # fmt: skip
    return {
        "architectures": ["BertForPreTraining"], "model_type": "bert", "max_position_embeddings": model.max_positions,
        "hidden_size": model.hidden_size, "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "intermediate_size": model.ffn_hidden_size, "hidden_act": "gelu", "type_vocab_size": 2,
        "layer_norm_eps": model.layer_norm_epsilon, "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout, **shared,
    }  # fmt: skip


def _tokenizer_config(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    theirs = {"end_of_text": "eos_token", "pad": "pad_token", "cls": "cls_token", "sep": "sep_token", "mask": "mask_token",
              "unknown": "unk_token"}  # fmt: skip
    names = {theirs[role]: name for role, name in tokenizer.special_names.items()}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.max_positions, **names}


def import_model(source: Path, out: Path) -> list[str]:
    """Write a Hugging Face model as the folder of a run of step 0; parameters it lacks, which get initial values.

    Raises RefusedInput listing everything that is not understood.
    """
    description = _json(source / "config.json", source)
    model = _our_model(description, source)
    loaders = _loaders(source)
    tokenizer = source / "tokenizer.json"
    _refuse_used(out)
    settings: dict[str, Any] = {"model": model.model_dump(mode="json", exclude_defaults=True)}
    settings["data"] = {"corpus": "python-docs", "sequence_length": min(model.max_positions, 1024)}
    settings |= {"train": {"steps": 1000}, "checkpoint": {"weights": str(out)}, "run": {"name": out.name}}
    with checkpoint_contents.appearing(out) as writing:
        folder = writing / "checkpoints" / "step_00000000"
        folder.mkdir(parents=True)
        try:
            found = hf.read(model.family, loaders.keys(), lambda name: loaders[name]().float(), model)
            lacking = _write_ours(found, model, folder)
        except (ValueError, IndexError, SafetensorError, RuntimeError, OSError) as error:
            fix = "import a model that transformers saved as GPT-2 or BERT"
            raise RefusedInput([Problem((f"SOURCE={source}",), str(error), fix)]) from error
        checkpoint.describe(folder, {"step": 0}, [checkpoint.checksums_of(folder, "shard-")])
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, writing / "tokenizer.json")
            name = "gpt2" if model.family == "gpt" else "bert"
            settings["data"] |= {"tokenizer": name, "tokenizer_path": str(out / "tokenizer.json")}
        (writing / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return lacking


def _our_model(theirs: dict[str, Any], source: Path) -> ModelConfig:
    """Shape of a config.json. Raises RefusedInput for what our models do not do."""
    family = TYPES.get(str(theirs.get("model_type")))
    if family is None:
        raise RefusedInput([Problem((f"model_type={theirs.get('model_type')}",), "only GPT-2 and BERT are understood",
                                    f"give a folder with a model of {' or '.join(TYPES)}")])  # fmt: skip
    wrong = [
        Problem((f"{key}={theirs[key]}", f"SOURCE={source}"), f"our {family} has {key}={value}", "import another model")
        for key, value in UNLIKE[family]
        if theirs.get(key, value) != value
    ]
    if wrong:
        raise RefusedInput(wrong)
    names = (
        ("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "layer_norm_epsilon", "resid_pdrop")
        if family == "gpt"
        else ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings",
              "layer_norm_eps", "hidden_dropout_prob")
    )  # fmt: skip
    layers, hidden, heads, inner, positions, epsilon, dropout = (theirs.get(name) for name in names)
    try:
        return ModelConfig.model_validate({
            "family": family, "layers": layers, "hidden_size": hidden, "heads": heads, "max_positions": positions,
            "ffn_hidden_size": inner or 4 * (hidden or 0), "vocab_size": theirs.get("vocab_size"),
            "dropout": float(dropout or 0.0),
            "layer_norm_epsilon": float(epsilon or (1e-5 if family == "gpt" else 1e-12)),
        })  # fmt: skip
    except (ValueError, TypeError, OverflowError) as error:
        problem = Problem(
            (f"{source}/config.json",), f"it says no shape: {error}", "give the config that belongs to it"
        )
        raise RefusedInput([problem]) from error


def _loaders(source: Path) -> dict[str, Callable[[], Tensor]]:
    """How to load each tensor of a folder's safetensors files. Raises RefusedInput where there are none, or bad ones."""
    files = [source / SINGLE]
    if (source / INDEX).is_file():
        files = _files_of(_json(source / INDEX, source).get("weight_map"), source)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        fix = "save it with transformers' save_pretrained, which writes safetensors; pickles are not read"
        raise RefusedInput([Problem((f"SOURCE={source}",), f"{', '.join(missing[:3])} is missing", fix)])

    def loader(file: Path, name: str) -> Callable[[], Tensor]:
        def load_it() -> Tensor:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)

        return load_it

    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {name: loader(file, name) for name in opened.keys()}  # noqa: SIM118  it is no dictionary
        except (SafetensorError, OSError) as error:
            problem = Problem((str(file),), f"it is no safetensors file: {error}", "get the file again")
            raise RefusedInput([problem]) from error
    return found


def _files_of(weight_map: Any, source: Path) -> list[Path]:
    """The files that an index names. Raises RefusedInput where it names none, or one outside of the folder."""
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or "\0" in name or Path(name).name != name for name in names):
        problem = Problem((f"{source / INDEX}",), "it does not name the files of its folder", "get the model again")
        raise RefusedInput([problem])
    return [source / name for name in sorted(set(names))]


def _write_ours(found: Iterator[tuple[str, Tensor | None]], model: ModelConfig, folder: Path) -> list[str]:
    """Files of a checkpoint with whole weights; what was lacking and was drawn."""
    from disttrain.memory import parameter_shapes

    shapes = parameter_shapes(model, range(model.layers))
    lacking: list[str] = []

    def ours() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in found:
            if tensor is None:
                lacking.append(name)
                tensor = initial_value(model, name, torch.Size(shapes[name]), Config().run.seed)
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and its config.json says {shapes[name]}")
            yield f"model.{name}", tensor

    for number, tensors in enumerate(checkpoint_contents.in_files(ours()), start=1):
        checkpoint_contents.write(tensors, folder / f"shard-00001-model-{number:05d}.safetensors")
    return lacking


def _json(path: Path, source: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        fix = "give the folder of a model that transformers saved"
        raise RefusedInput([Problem((f"SOURCE={source}",), f"{path.name} cannot be read: {error}", fix)]) from error
    return found if isinstance(found, dict) else {}


def _refuse_used(out: Path) -> None:
    if out.exists():
        raise RefusedInput([Problem((f"OUT={out}",), "it is there already", "name a folder that is not there")])
