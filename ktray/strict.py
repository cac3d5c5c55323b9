"""What every spec is: frozen, and strict about its fields and their types."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class StrictSpec(BaseModel):
    """Frozen and strict: an unknown field is an error, never ignored, and true is no 1, "5" no 5, "on" no true."""

    # Not pydantic's strict=True, which also refuses a list for a tuple and a mapping for a spec.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_own_type(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = plain_types(cls, info.field_name or "")
        entries = value if isinstance(value, list | tuple) else (value,)
        if wanted and any(_disguised(entry, wanted) for entry in entries):
            kind, text = _WANTED[next(each for each in _WANTED if each in wanted)]
            if isinstance(value, list | tuple):
                raise PydanticCustomError("entries_type", "a list, each entry a {text}", {"text": text})
            raise PydanticCustomError(kind, "Input should be a {text}", {"text": text})
        return value


_WANTED: dict[type, tuple[Any, str]] = {
    float: ("float_type", "finite number"),
    int: ("int_type", "whole number"),
    bool: ("bool_type", "true or false"),
}


@lru_cache(maxsize=1024)
def plain_types(model: type[BaseModel], name: str) -> frozenset[type]:
    """The types of a field that is only numbers, booleans and null; empty for any other field."""
    field = model.model_fields[name]
    if any(isinstance(each, BeforeValidator) for each in field.metadata):  # it reads text of its own, such as 30m
        return frozenset()
    types = frozenset(_leaves(field.annotation))
    return types if types <= {int, float, bool, type(None)} and types & {int, float, bool} else frozenset()


def _leaves(annotation: Any) -> set[Any]:
    inside = getattr(annotation, "__metadata__", None) is not None
    arguments = get_args(annotation)[:1] if inside else [each for each in get_args(annotation) if each is not Ellipsis]
    return {leaf for each in arguments for leaf in _leaves(each)} if arguments else {annotation}


def _disguised(value: Any, wanted: frozenset[type]) -> bool:
    """Whether pydantic would turn a value of another type into one of `wanted`."""
    if isinstance(value, bool):
        return bool not in wanted
    return isinstance(value, str) or (isinstance(value, int | float) and wanted <= {bool, type(None)})
