"""A model of the user's own: a class in a Python file, named in the config as `path/to/file.py:Class`."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from disttrain.config.problems import Problem, RefusedInput


def load_class(source: str, base: type) -> Any:
    """The class that `model.source` names. Raises RefusedInput where there is none, or it does not extend `base`."""
    path, _, name = source.rpartition(":")
    found = getattr(_module(Path(path).resolve()), name, None) if path and Path(path).is_file() else None
    if not isinstance(found, type):
        raise RefusedInput([Problem((f"model.source={source}",), "there is no such class in such a file",
                                    "write model.source=path/to/file.py:ClassName")])  # fmt: skip
    if not issubclass(found, base):
        raise RefusedInput([Problem((f"model.source={source}", f"model.family={base.__name__.lower()}"),
                                    f"{name} does not extend disttrain.models.{base.__name__}, whose batches it gets",
                                    f"write class {name}(disttrain.models.{base.__name__})")])  # fmt: skip
    return found


@cache
def _module(path: Path) -> ModuleType:
    """The file as a module; what goes wrong inside it is the user's to see."""
    name = f"model_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
