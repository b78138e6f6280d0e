"""What every part of the configuration has in common: immutable, strict about its keys and about numbers."""

from __future__ import annotations

import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Text = Annotated[str, Field(min_length=1)]
"""A string that must say something."""

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about its keys. Numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number or text belongs (pydantic takes them for 1 and 0); read 1e4 as one."""
        assert info.field_name is not None
        accepted = scalar_types(cls.model_fields[info.field_name].annotation)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if bool not in accepted and any(isinstance(part, bool) for part in parts):
            raise PydanticCustomError("truth_value", "Input should not be true or false (quote what is meant as text)")
        if isinstance(value, str) and int in accepted and str not in accepted and _EXPONENT.fullmatch(value):
            return float(value)  # YAML 1.1 reads 1e4, without a point, as text
        return value


def scalar_types(annotation: Any) -> set[Any]:
    """The plain types that an annotation mentions, at any depth."""
    origin = get_origin(annotation)
    if origin is Literal:
        return set()
    if origin is Annotated:
        return scalar_types(get_args(annotation)[0])
    if origin in (Union, UnionType, tuple, dict):
        return {found for part in get_args(annotation) for found in scalar_types(part)}
    return {annotation}
