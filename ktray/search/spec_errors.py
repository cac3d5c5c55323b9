"""Errors in a user's file, one sentence each: where, what is wrong, what to write instead. Translates pydantic's errors."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from ktray import plugins
from ktray.errors import UserError
from ktray.spec import TEACHERS, DataRoles, HandcraftedTeacher, NamedTeacher, PairSpec, PrecomputedTeacher, SeveralTeachers
from ktray.text import near_word, shown

_ALTERNATIVE = re.compile(
    r"(?:constrained|nullable|function|lax|chain|json|is)-|(?:tuple|list|literal|dict)\[|(?:int|float|str|bool|none)$"
)
"""What pydantic puts into the path of an error for one of several types of a field; no name of a field is like it."""
MAX_SHOWN = 5
MAX_TRANSLATED = 50  # errors; a list of 10,000 wrong entries has as many, and the first few say what is wrong
Path = tuple[str | int, ...]
_PLUGIN_KINDS = {  # field of a pair -> kind of plugin that it names
    "backbone": "backbone",
    "pretext": "pretext",
    "descriptor": "descriptor",
    "transfer": "transfer",
    "evals": "evaluation",
    "data": "dataset",
}
_TEACHERS = [(field, model, f"{name} (one with {field!r})") for field, (model, name) in TEACHERS.items()]
_RULES = {  # pydantic's error type -> what the value should be
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a finite number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "a mapping (name: value)"),
    "string_type": "text",
    "none_required": "left out",
    "string_too_long": "of at most {max_length} characters",
    "string_too_short": "of at least {min_length} character",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


@dataclass(frozen=True)
class SpecProblem:
    """One error; `where` is a dotted path in the file, `instead` a correction."""

    where: str
    problem: str
    instead: str = ""

    def __str__(self) -> str:
        return str(UserError(self.problem, self.where, self.instead))


def suggestion(word: str, known: Sequence[str]) -> str:
    """``Did you mean 'k'? `` with the known word closest to `word`; empty if none is close."""
    near = near_word(word, known)
    return f"Did you mean {near!r}? " if near else ""


def raise_if_any(problems: Sequence[SpecProblem], source: str) -> None:
    """Raises one UserError with the first `MAX_SHOWN` of `problems`, if there are any."""
    if not problems:
        return
    if len(problems) == 1:
        (only,) = problems
        raise UserError(only.problem, f"{source}: {only.where}" if only.where else source, only.instead)
    more = (f"and {len(problems) - MAX_SHOWN} more",) if len(problems) > MAX_SHOWN else ()
    lines = tuple(f"- {problem}" for problem in problems[:MAX_SHOWN])
    raise UserError(f"{len(problems)} things are wrong", source, entries=(*lines, *more))


def problems_from_validation(
    error: ValidationError, model: type[BaseModel], value: Any, where: Callable[[Path], str]
) -> list[SpecProblem]:
    """Pydantic's errors about `value` as a `model`, in terms of the user's file.

    Args:
        where: path of a field in `value` -> dotted path in the file, as the user wrote it.
    """
    value, locate = _with_data_roles(value, where) if model is PairSpec else (value, where)
    flat = itertools.islice(_flatten_errors(error, ()), MAX_TRANSLATED)
    items = [_without_alternatives(path, item) for path, item in flat]
    # If entries of a list are wrong, pydantic also reports the list itself as too short: keep only the innermost errors.
    innermost = [(path, item) for path, item in items if not any(path == other[: len(path)] != other for other, _ in items)]
    found = _joined(dict.fromkeys(_translate(item, path, model, value, locate) for path, item in innermost))
    hints = {problem.instead for problem in found}  # a misspelt field is also missing under its right name: report it once
    return [p for p in found if f"Did you mean {p.where.split('.')[-1]!r}?" not in hints or "is missing" not in p.problem]


def _without_alternatives(path: Path, item: Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
    """An error as one of its field, where pydantic names one of several types that the field may have."""
    steps = tuple(step for step in path if not _ALTERNATIVE.match(str(step)))
    return steps, {**item, "type": _ONE_OF} if steps != path and item["type"] == "literal_error" else item


_ONE_OF = "literal_among_types"
_SHOULD_BE = " and should be "


def _joined(problems: Iterable[SpecProblem]) -> list[SpecProblem]:
    """The problems, with what each of several types of one field expects in one sentence: ``at least 1, or a list``."""
    found: dict[tuple[str, str], SpecProblem] = {}
    for problem in problems:
        begin, should_be, expected = problem.problem.partition(_SHOULD_BE)
        key = (problem.where, begin if should_be else problem.problem)
        if should_be and key in found:
            problem = replace(found[key], problem=f"{found[key].problem}, or {expected}")
        found[key] = problem
    return list(found.values())


def _flatten_errors(error: ValidationError, above: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    # A plugin's spec is validated inside a validator, so its errors are nested and their paths start at the plugin.
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ValidationError):
            yield from _flatten_errors(inner, (*above, *item["loc"]))
        else:
            yield (*above, *item["loc"]), item


def _with_data_roles(value: Any, where: Callable[[Path], str]) -> tuple[Any, Callable[[Path], str]]:
    """A pair with its data roles written out, and a `where` for it that drops the roles that the file does not have."""
    return _expand_data_roles(value), lambda path: where(_path_in_file(path, value))


def _expand_data_roles(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = dict(value)
    if not _has_roles(value):
        found["data"] = dict.fromkeys(DataRoles.model_fields, value.get("data"))
    inner = _child_at(value.get("teacher"), "pair")
    if isinstance(inner, Mapping):
        found["teacher"] = {**value["teacher"], "pair": _expand_data_roles({"data": value.get("data"), **inner})}
    return found


def _has_roles(value: Any) -> bool:
    data = _child_at(value, "data")
    return isinstance(data, Mapping) and "kind" not in data


def _path_in_file(path: Path, value: Any) -> Path:
    """Path in the file of a field of the pair with its roles written out; an inner pair may inherit the outer pair's data."""
    if path[:2] == ("teacher", "pair"):
        inner = _child_at(_child_at(value, "teacher"), "pair")
        if path[2:3] == ("data",) and isinstance(inner, Mapping) and "data" not in inner:
            return _path_in_file(path[2:], value)
        return ("teacher", "pair", *_path_in_file(path[2:], inner))
    return (*path[:1], *path[2:]) if path[:1] == ("data",) and not _has_roles(value) else path


def _translate(
    item: Mapping[str, Any], path: Path, model: type[BaseModel], value: Any, where: Callable[[Path], str]
) -> SpecProblem:
    location = where(path)
    name = str(path[-1]) if path else ""
    if name not in location.split("."):  # a data role that the file does not write out
        name = location.split(".")[-1]
    inner = item.get("ctx", {}).get("error")
    cause = getattr(inner, "__cause__", None)
    if isinstance(cause, UserError):
        return SpecProblem(location, cause.problem, cause.instead)
    if item["type"] == "extra_forbidden":
        return _unknown_field_problem(path, model, value, where)
    if item["type"] == "missing":
        return SpecProblem(location, f"entry {name} is missing" if name.isdigit() else f"{shown(name)} is missing")
    if item["type"] == "value_error":
        return SpecProblem(location, str(inner or item["msg"]).removeprefix("Value error, "))
    if item["type"] == _ONE_OF:
        return SpecProblem(
            location, f"{name} is {_scalar_or_type(item['input'])}{_SHOULD_BE}{' or '.join(_literal_options(item))}"
        )
    if item["type"] == "literal_error":
        options = _literal_options(item)
        hint = suggestion(item["input"], options) if isinstance(item["input"], str) else ""
        listed = f"It is one of {', '.join(options)}." if len(options) > 1 else f"It is always {options[0]}: leave it out."
        return SpecProblem(location, f"{name} cannot be {shown(item['input'])}", f"{hint}{listed}")
    if name.isdigit():
        name = f"entry {name}"
    return SpecProblem(location, f"{name} is {_scalar_or_type(item['input'])}{_SHOULD_BE}{_expected_text(item)}")


def _expected_text(item: Mapping[str, Any]) -> str:
    rule = _RULES.get(item["type"])
    if rule is None:
        text = str(item["msg"]).removeprefix("Input should be ")
        return text[:1].lower() + text[1:]
    return rule.format(**item.get("ctx", {}))


def _scalar_or_type(value: Any) -> str:
    """A scalar as it is written in the file; of anything else only its type."""
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


def _literal_options(item: Mapping[str, Any]) -> list[str]:
    text = str(item.get("ctx", {}).get("expected", ""))
    return [word.strip().strip("'") for word in text.replace(" or ", ", ").split(",")]


def _unknown_field_problem(path: Path, model: type[BaseModel], value: Any, where: Callable[[Path], str]) -> SpecProblem:
    name, location = str(path[-1]), where(path)
    owner, title = _model_at(path[:-1], model, value)
    known = [field for field in owner.model_fields if field != "kind"] if owner else []
    hint = suggestion(name, known)
    if hint:
        return SpecProblem(location, f"there is no field {shown(name)}", hint.strip())
    others = [text for _, other, text in _TEACHERS if owner is not other and name in other.model_fields]
    if path[-2:-1] == ("teacher",) and others:
        reason = "; it is not trained" if owner in (HandcraftedTeacher, PrecomputedTeacher, NamedTeacher) else ""
        return SpecProblem(location, f"{title} has no {shown(name)}{reason}", f"Leave it out; only {others[0]} has it.")
    listed = f"{title or 'It'} has {', '.join(known)}." if known else f"{title or 'It'} has no fields but its kind."
    return SpecProblem(location, f"there is no field {shown(name)}", listed[:1].upper() + listed[1:])


def _model_at(path: Path, model: type[BaseModel] | None, value: Any) -> tuple[type[BaseModel] | None, str]:
    """The spec of the part of `value` at `path`, and its name in a message."""
    title, plugin_kind = "", ""
    for step in path:
        value = _child_at(value, step)
        field = model.model_fields.get(str(step)) if model and isinstance(step, str) else None
        if plugin_kind != "dataset":  # below `data` even the roles "pretext" and "transfer" name data sets
            plugin_kind = _PLUGIN_KINDS.get(str(step), plugin_kind)
        annotation = field.annotation if field else None
        if (step == "teacher" or (model is SeveralTeachers and step == "several")) and isinstance(value, list | tuple):
            model, title = SeveralTeachers, ""
        elif (step == "teacher" or (model is SeveralTeachers and isinstance(step, int))) and isinstance(value, Mapping):
            model, title = next(((owner, text) for field, owner, text in _TEACHERS if field in value), (None, ""))
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation.model_fields:
            model, title = annotation, f"{step!r}"
        else:
            model, title = _plugin_spec(plugin_kind, value)
    return model, title


def _child_at(value: Any, step: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(step)
    return value[step] if isinstance(value, list | tuple) and isinstance(step, int) else None


def _plugin_spec(plugin_kind: str, value: Any) -> tuple[type[BaseModel] | None, str]:
    if plugin_kind == "dataset" and isinstance(value, Mapping) and "kind" not in value:
        return DataRoles, "'data'"
    kind = value.get("kind") if isinstance(value, Mapping) else value
    if plugin_kind == "dataset" and isinstance(kind, str):
        kind = kind.partition("?")[0].partition(":")[0]
    if not plugin_kind or not isinstance(kind, str):
        return None, ""
    try:
        return plugins.module(plugin_kind, kind).Spec, f"the {plugin_kind} {shown(kind)}"
    except UserError:
        return None, ""
