"""YAML file + ``key=value`` overrides -> `Config`, with every problem of the text reported at once."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from pydantic import BaseModel, ValidationError

from disttrain.config import presets
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config, ModelConfig
from disttrain.sets import SETS, tags_of


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two changes: ``3e-4`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply overrides such as ``optim.lr=3e-4`` (values are YAML).

    Raises RefusedInput with every problem found: unreadable file, YAML syntax, unknown keys (the nearest known one
    is suggested), wrong types, values out of range.
    """
    problems: list[Problem] = []
    tree = read_tree(Path(path), problems) if path is not None else {}
    for word in overrides:
        _override(tree, word, problems)
    if path is not None and isinstance(tree.get("run", {}), dict):
        tree.setdefault("run", {}).setdefault("name", Path(path).stem)
    if isinstance(tree.get("model"), dict):
        tree["model"] = _apply_preset(tree["model"], problems)
    config = _validate(tree, problems)
    if problems or config is None:
        raise RefusedInput(problems)
    return with_values(config, _derived(config))


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The same config with some dotted keys replaced, for example ``{"model.vocab_size": 261}``."""
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(model: Any, keys: list[str], value: Any) -> Any:
    name, *rest = keys
    new = _replaced(getattr(model, name), rest, value) if rest else value
    return model.model_copy(update={name: new})


def dump(config: Config) -> str:
    """The whole config as YAML, every value written out; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of every setting, in the order of the schema."""
    keys = []
    for name, field in model.model_fields.items():
        section = field.annotation
        keys += all_keys(section, f"{prefix}{name}.") if _is_section(section) else [prefix + name]
    return keys


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name most like this one, if any is alike at all."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches:  # a right last part in the wrong section: optim.dropout -> model.dropout
        tail = name.rsplit(".", 1)[-1]
        matches = [key for key in known if key.rsplit(".", 1)[-1] == tail][:1]
    return matches[0] if matches else None


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def read_tree(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """The settings in a YAML file; empty, and a problem more, where it cannot be read or holds none."""
    try:
        tree = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [str(p) for p in sorted(path.parent.glob("*.y*ml"))][:5] if path.parent.is_dir() else []
        fix = f"give one of: {', '.join(near)}" if near else "check the path"
        problems.append(Problem((str(path),), "the config file does not exist", fix))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(
            Problem((str(path),), f"the config file cannot be read: {error}", "check the path and its rights")
        )
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        problems.append(Problem((str(path),), f"not valid YAML{where}: {reason}", "correct the syntax"))
    else:
        if tree is None:
            return {}
        if isinstance(tree, dict):
            return tree
        problems.append(Problem((str(path),), "the file does not hold settings but a " + type(tree).__name__,
                                "write sections such as 'model:' with indented settings"))  # fmt: skip
    return {}


def parsed(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, also for what PyYAML itself stumbles over."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # a 99th month, a number of 5000 digits
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def _override(tree: dict[str, Any], word: str, problems: list[Problem]) -> None:
    key, equals, text = word.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        problems.append(Problem((word or "''",), "an override has the form key=value", "for example optim.lr=3e-4"))
        return
    try:
        value = parsed(text) if text else None
    except yaml.YAMLError:
        problems.append(Problem((word,), "the value is not valid YAML", "quote it: 'key=\"value\"'"))
        return
    node = tree
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            problems.append(Problem((word,), f"'{part}' is a value, not a section", "see `disttrain schema`"))
            return
        node = node[part]
    node[parts[-1]] = value


def _apply_preset(model: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    try:
        return presets.apply_preset(model)
    except RefusedInput as refused:
        problems.extend(refused.problems)
        return {key: value for key, value in model.items() if key != "preset"}


def _validate(tree: dict[str, Any], problems: list[Problem]) -> Config | None:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems.extend(explain(e, all_keys(), "`disttrain schema`") for e in error.errors())
        return None


def explain(error: Any, known: Sequence[str], reference: str) -> Problem:
    """One of pydantic's errors in our words; `known` are the settings there are, `reference` is where they are listed."""
    key = ".".join(str(part) for part in error["loc"]) or "''"
    value = error["input"]
    if error["type"] == "extra_forbidden":
        guess = nearest(key, known)
        if guess is None and len(error["loc"]) == 1:
            guess = nearest(key, sorted({name.split(".")[0] for name in known}))
        return Problem((key,), "unknown setting", f"did you mean '{guess}'?" if guess else f"see {reference}")
    given = f"{key}={value!r}" if not isinstance(value, dict) else key
    if error["type"] == "missing":
        return Problem((key,), "this setting must be given", f"add {error['loc'][-1]}")
    if error["type"] == "model_type":
        return Problem((given,), "this is a section, not a value", f"indent its settings below '{key}:'")
    message = error["msg"][0].lower() + error["msg"][1:]
    kind = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
            "string_type": "text (quote it)"}.get(error["type"])  # fmt: skip
    return Problem((given,), message, f"give {kind}" if kind else f"give a value that fits: {message}")


def _derived(config: Config) -> dict[str, Any]:
    model = config.model
    chosen = SETS.get(config.task.set or "")
    if chosen is not None:
        labels = model.labels or len(tags_of(chosen.labels, config.task.scheme)) or None
        return {**_shape(model), "model.head": chosen.kind, "model.labels": labels}
    return _shape(model)


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {
        "model.ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "model.layer_norm_epsilon": model.layer_norm_epsilon or (1e-5 if model.family == "gpt" else 1e-12),
    }
