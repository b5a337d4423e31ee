"""Settings by their dotted names: how checks read and name them."""

from functools import cache
from typing import Any

from pydantic import BaseModel

from disttrain.config.problems import Problem
from disttrain.config.schema import Config


def setting(config: Config, key: str) -> str:
    """A setting as the user would write it, ``model.heads=5``."""
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{key}={text}"


def given(config: Config, key: str) -> bool:
    """Whether the user asked for something here: a value other than the default (which a saved config writes out)."""
    section, name = key.split(".")
    model = getattr(config, section)
    return getattr(model, name) != _default(type(model), name)


@cache  # asked half a million times where layouts are enumerated; nobody changes a default
def _default(section: type[BaseModel], name: str) -> Any:
    return section.model_fields[name].get_default(call_default_factory=True)


def no_effect(config: Config, key: str, because: str, fix: str) -> Problem:
    """A setting was given that nothing reads, because of another one; `fix` makes it count."""
    settings = (setting(config, key), setting(config, because))
    return Problem(settings, "this setting has no effect here", f"remove {key} or use {fix}")
