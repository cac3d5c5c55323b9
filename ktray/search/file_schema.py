"""JSON schemas of the files that users write, for editors: spaces, pairs and runtime files, with all kinds of ktray.

A schema accepts whatever ktray accepts. It refuses unknown fields, wrong types and values out of range, but not what depends on
several fields or on the data; `ktray plan` checks that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ktray import plugins, spec
from ktray.evaluation_presets import PRESETS
from ktray.scheduler.resources import STAGES, RuntimeSettings
from ktray.search.space_file import SpaceFile
from ktray.search.space_tree import RANGES

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE = "#/$defs/{model}"
Schema = dict[str, Any]


def schema_of_pair() -> Schema:
    """The schema of a pair file."""
    definitions, of_model = _definitions()
    return _file("A pair of ktray", {**of_model(spec.PairSpec), "$defs": definitions})


def schema_of_space() -> Schema:
    """The schema of a space file, in whose pair operators such as ``{choice: [50, 200]}`` may stand anywhere."""
    definitions, of_model = _definitions()
    drawn = {name: _with_operators(each) for name, each in definitions.items()}
    fields, own = _space_fields()
    fields["properties"]["pair"] = _drawable(of_model(spec.PairSpec))
    return _file("A search space of ktray", {**fields, "$defs": {**drawn, **own}})


def schema_of_runtime() -> Schema:
    """The schema of a runtime file."""
    found = RuntimeSettings.model_json_schema()
    request = found["properties"]["stages"]["additionalProperties"]
    found["properties"]["stages"] = {
        "type": ["object", "null"],
        "properties": {stage: request for stage in STAGES},
        "additionalProperties": False,
        "description": "stage -> what it requests; fields that are left out keep their defaults",
    }
    return _file("A runtime file of ktray", found)


SCHEMAS: dict[str, Callable[[], Schema]] = {
    "space": schema_of_space,
    "pair": schema_of_pair,
    "runtime": schema_of_runtime,
}


def _file(title: str, schema: Schema) -> Schema:
    return {"$schema": _DIALECT, **schema, "title": title}


def _space_fields() -> tuple[Schema, Schema]:
    """The fields of a space file beside its pair, and the definitions that they refer to, under names of their own."""
    found = SpaceFile.model_json_schema(ref_template="#/$defs/Space{model}")
    return found, {f"Space{name}": each for name, each in found.pop("$defs").items()}


def _definitions() -> tuple[Schema, Callable[[type[BaseModel]], Schema]]:
    """The schemas of all models that a pair is made of, without operators, and a function from a model to its reference."""
    kinds = {group: [plugins.module(group, kind).Spec for kind in plugins.kinds(group)] for group in plugins.GROUPS}
    teachers = [model for model, _ in spec.TEACHERS.values()]
    models = [spec.PairSpec, *teachers, *(model for found in kinds.values() for model in found)]
    references, top = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)

    def of_model(model: type[BaseModel]) -> Schema:
        return dict(references[model, "validation"])

    definitions: Schema = {name: _resolved(each) for name, each in top["$defs"].items()}
    definitions["teacher"] = {"anyOf": [of_model(model) for model in teachers]}
    for group, found in kinds.items():
        definitions[group] = _kind_schema(group, [of_model(model) for model in found])
    pair = definitions[references[spec.PairSpec, "validation"]["$ref"].rpartition("/")[2]]["properties"]
    pair["data"] = {"anyOf": [_group("dataset"), pair["data"]]}
    pair["evals"] = _evaluations()
    several = definitions[references[spec.SeveralTeachers, "validation"]["$ref"].rpartition("/")[2]]["properties"]["several"]
    several["items"] = {"anyOf": [_group("teacher"), {"type": "null", "description": "an entry that is left out"}]}
    return definitions, of_model


def _group(name: str) -> Schema:
    return {"$ref": _REFERENCE.format(model=name)}


def _kind_schema(group: str, specs: list[Schema]) -> Schema:
    """A kind of a group: its name, or a mapping with `kind`; a name with a dot is a plugin from outside of ktray."""
    names = "|".join(plugins.kinds(group))
    text = rf"^({names})([:?].*)?$" if group == "dataset" else f"^({names})$"
    outside = r"^\w+(\.\w+)+"
    return {
        "anyOf": [
            {"type": "string", "enum": plugins.kinds(group)},
            {"type": "string", "pattern": text},
            {"type": "string", "pattern": outside},
            *({**each, "required": ["kind"]} for each in specs),
            {"type": "object", "properties": {"kind": {"type": "string", "pattern": outside}}, "required": ["kind"]},
        ]
    }


def _evaluations() -> Schema:
    preset: Schema = {"type": "string", "enum": list(PRESETS)}
    return {"anyOf": [preset, {"type": "array", "items": {"anyOf": [preset, _group("evaluation")]}}]}


def _resolved(schema: Any) -> Any:
    """The schema with references to groups of kinds where a model has the mark of one."""
    if isinstance(schema, list):
        return [_resolved(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("kinds"), str):
        rest = {name: each for name, each in schema.items() if name not in ("kinds", "title")}
        return {**rest, **_group(schema["kinds"])}
    return {name: _resolved(each) for name, each in schema.items()}


# ---- operators


def _with_operators(schema: Schema) -> Schema:
    """A definition in which every field but `kind`, and every entry of a list, may be drawn."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [_with_operators(each) for each in schema["anyOf"]]}
    if "properties" in schema:
        fields = {
            name: each if name == "kind" and "const" in each else _drawable(_with_operators(each))
            for name, each in schema["properties"].items()
        }
        return {**schema, "properties": fields}
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return {**schema, "items": _drawable(_with_operators(schema["items"]))}
    return schema


def _drawable(schema: Schema) -> Schema:
    """What this schema accepts, or an operator that draws it."""
    inner = {name: each for name, each in schema.items() if name not in ("default", "description", "title")}
    again = {"type": "object", "description": "an operator inside this one"}
    options: Schema = {"anyOf": [inner, again]} if inner else {}
    operators = [
        _mapping("choice", {"type": "array", "minItems": 1, "items": options}, "one of these"),
        _mapping("one_of", {"type": "object", "minProperties": 1, "additionalProperties": options}, "one of these branches"),
    ]
    if not inner or _has_numbers(inner):
        ends = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
        operators += [_mapping(name, ends, "a number in this range, both ends included") for name in RANGES]
    said: Schema = {name: schema[name] for name in ("default", "description") if name in schema}
    return {**said, "anyOf": [inner, *operators]}


def _mapping(name: str, schema: Schema, description: str) -> Schema:
    return {
        "type": "object",
        "properties": {name: {**schema, "description": description}},
        "required": [name],
        "additionalProperties": False,
    }


def _has_numbers(schema: Schema) -> bool:
    return schema.get("type") in ("integer", "number") or any(map(_has_numbers, schema.get("anyOf", ())))
