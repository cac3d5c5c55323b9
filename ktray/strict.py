"""`StrictSpec`, the base of every spec: frozen, and strict about its fields and their types."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class StrictSpec(BaseModel):
    """A frozen pydantic model that rejects unknown fields and converts no types: true is not 1, "5" not 5, "on" not true."""

    # pydantic's strict=True would also reject a list for a tuple and a mapping for a spec.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_other_types(cls, value: Any, info: ValidationInfo) -> Any:
        allowed = plain_types(cls, info.field_name or "")
        entries = value if isinstance(value, list | tuple) else (value,)
        if allowed and any(_would_be_converted(entry, allowed) for entry in entries):
            kind, text = _ERRORS[next(each for each in _ERRORS if each in allowed)]
            if isinstance(value, list | tuple):
                raise PydanticCustomError("entries_type", "a list, each entry a {text}", {"text": text})
            raise PydanticCustomError(kind, "Input should be a {text}", {"text": text})
        return value


def added_field(
    default: Any,
    *,
    description: str | None = None,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Any:
    """A field that a spec was given after results with it existed: at its default it is left out of dumps, and so of keys.

    Args:
        default: it must mean what the spec meant without the field.
        description, gt, ge, lt, le: as for pydantic's `Field`.
    """
    bounds: dict[str, Any] = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return Field(default=default, description=description, exclude_if=lambda value: bool(value == default), **given)


_ERRORS: dict[type, tuple[Any, str]] = {
    float: ("float_type", "finite number"),
    int: ("int_type", "whole number"),
    bool: ("bool_type", "true or false"),
}


@lru_cache(maxsize=1024)
def plain_types(model: type[BaseModel], name: str) -> frozenset[type]:
    """The types of a field that holds only numbers, booleans and null; empty for any other field."""
    field = model.model_fields[name]
    if any(isinstance(each, BeforeValidator) for each in field.metadata):  # it parses text itself, such as 30m
        return frozenset()
    types = frozenset(_leaves(field.annotation))
    return types if types <= {int, float, bool, type(None)} and types & {int, float, bool} else frozenset()


def _leaves(annotation: Any) -> set[Any]:
    inside = getattr(annotation, "__metadata__", None) is not None
    arguments = get_args(annotation)[:1] if inside else [each for each in get_args(annotation) if each is not Ellipsis]
    return {leaf for each in arguments for leaf in _leaves(each)} if arguments else {annotation}


def _would_be_converted(value: Any, allowed: frozenset[type]) -> bool:
    """Whether pydantic would convert a value of another type to one of the `allowed` types."""
    if isinstance(value, bool):
        return bool not in allowed
    return isinstance(value, str) or (isinstance(value, int | float) and allowed <= {bool, type(None)})
