"""What the groups of settings are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=1 << 20)]
"""Of what the checks go through one by one: heads, ranks, ..."""
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _without_nul(cls, value: Any) -> Any:
        """No file and no program takes such a text."""
        if any(isinstance(text, str) and "\0" in text for text in (value if isinstance(value, list) else [value])):
            raise ValueError("there is a NUL character in it")
        return value
