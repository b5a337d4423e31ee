"""A YAML file that holds one section's settings, in place of a whole run's. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from disttrain.config.load import all_keys, explain, parsed, read_tree
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.section import Section

Kind = TypeVar("Kind", bound=Section)


def load_section(kind: type[Kind], path: Path, overrides: Sequence[str], reference: str) -> Kind:
    """Read a file and apply overrides such as ``lr=0.05`` (values are YAML); `reference` says where settings are listed.

    The file's stem is the `name` where none is given. Raises RefusedInput with every problem of the text: an unreadable
    file, YAML syntax, unknown keys, wrong types, values out of range.
    """
    problems: list[Problem] = []
    tree = read_tree(path, problems)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            problems.append(Problem((word or "''",), "an override has the form key=value", "for example lr=0.05"))
            continue
        try:
            tree[key] = parsed(text) if text else None
        except yaml.YAMLError:
            problems.append(Problem((word,), "the value is not valid YAML", "quote it: 'key=\"value\"'"))
    if "name" in kind.model_fields:
        tree.setdefault("name", path.stem)
    try:
        settings = kind.model_validate(tree)
    except ValidationError as error:
        problems.extend(explain(e, all_keys(kind), reference) for e in error.errors())
        raise RefusedInput(problems) from None
    if problems:
        raise RefusedInput(problems)
    return settings


def dump_section(settings: Section) -> str:
    """The settings as YAML, every value written out; `load_section` gives equal ones."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def without_effect(settings: Section, keys: Sequence[str], because: str, fix: str) -> list[Problem]:
    """A problem for each key that differs from its default although nothing reads it, `because` of another setting."""
    fields = type(settings).model_fields
    return [
        Problem(
            (f"{key}={getattr(settings, key)}", because), "this setting has no effect here", f"remove {key} or {fix}"
        )
        for key in keys
        if getattr(settings, key) != fields[key].get_default(call_default_factory=True)
    ]
