"""The schema as a person and as an editor read it. Imports no torch."""

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.table import Table

from disttrain.config.schema import Config


def json_schema() -> str:
    """JSON schema of a config file, with the unit of every field in its description."""
    return json.dumps(Config.model_json_schema(), indent=2)


def table() -> Table:
    """Every setting with its type, default and meaning."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("setting", no_wrap=True, style="cyan")
    shown.add_column("values")
    shown.add_column("default")
    shown.add_column("meaning", ratio=1)
    for row in _rows(Config, ""):
        shown.add_row(*row)
    return shown


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _rows(annotation, f"{prefix}{name}.")
            continue
        values = _values(schema["properties"][name], schema.get("$defs", {}))
        default = "(required)" if field.default is PydanticUndefined else json.dumps(field.default)
        yield f"{prefix}{name}", values, default, " ".join((field.description or "").split())
        for section in get_args(annotation):  # a list of sections: blend
            for inner in get_args(section):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield from _rows(inner, f"{prefix}{name}[].")


def _values(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return ", ".join(_values(option, definitions) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_values(schema['items'], definitions)}"
    kind = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
    return " ".join(part for part in (kind.get(schema.get("type", ""), schema.get("type", "")), bounds) if part)
