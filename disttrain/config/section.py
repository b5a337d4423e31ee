"""What the groups of settings are made of."""

import os
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=1 << 20)]
"""Of what the checks go through one by one: heads, ranks, ..."""
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

PATHS = ("name", "dir", "path", "held_out_path", "cache_dir", "tokenizer_path", "resume", "weights", "vocabulary")
"""Settings that name files or folders."""


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any, info: ValidationInfo) -> Any:
        """What no file and no program takes: a NUL character, a path that is too long, the home of nobody."""
        for text in [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]:
            if "\0" in text:
                raise ValueError("there is a NUL character in it")
            if info.field_name in PATHS:
                if len(text) > 4000 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
                    raise ValueError("this path, or a name in it, is too long")
                if text.startswith("~") and os.path.expanduser(text) == text:
                    raise ValueError("there is no such home folder")
        return value
