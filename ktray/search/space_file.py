"""The YAML file of a search space: its fields as strict specs, and overrides such as ``--set transfer.k=500``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.search import spec_errors
from ktray.search.space_tree import OPERATORS
from ktray.spec import Seed
from ktray.strict import StrictSpec
from ktray.text import counted, first_few, shown
from ktray.yaml_file import MAX_DEPTH, parse_yaml, read_text

MAX_PATH = 1000  # characters of the path in an override
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _parse_duration(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value)
    if not parts or "".join(number + unit for number, unit in parts) != value.replace(" ", ""):
        raise ValueError(f"{shown(value)} is not a duration; write 90s, 30m, 12h, 2d or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


class Objective(StrictSpec):
    """A metric to optimise; a missing `mode` is taken from the evaluation."""

    metric: str
    mode: Literal["max", "min"] | None = None


class Budget(StrictSpec):
    """Limits of a search; not part of the space's identity."""

    trials: int = Field(default=20, ge=1, le=999_999_999, description="draws; failed ones count, duplicates do not")
    concurrent: int = Field(default=4, ge=1, description="trials at a time; a search runs at most 64")
    stop_after: Annotated[
        Annotated[float, Field(gt=0)] | None, BeforeValidator(_parse_duration, json_schema_input_type=float | str | None)
    ] = None  # seconds, over all resumes
    hours: float | None = Field(default=None, gt=0, description="of stages, summed over all workers and resumes")


class TeacherStop(StrictSpec):
    """Which teachers get students: the best share of those evaluated so far, by an evaluation `of: teacher`."""

    metric: str
    reduction: int | None = Field(default=None, ge=2, description="the best 1/reduction of the teachers")
    keep: float | None = Field(default=None, gt=0, le=1, description="or their best share")
    mode: Literal["max", "min"] | None = None

    @model_validator(mode="after")
    def _check_one_share(self) -> TeacherStop:
        if (self.reduction is None) == (self.keep is None):
            raise ValueError("give either 'reduction' (3: the best third of the teachers get students) or 'keep' (0.3)")
        return self

    @property
    def kept_share(self) -> float:
        """The share of the teachers that get students, in (0, 1]."""
        return self.keep if self.keep is not None else 1 / (self.reduction or 1)


class EarlyStop(StrictSpec):
    """Successive halving: at each rung (student epochs) the best 1/`reduction` go on."""

    metric: str
    rungs: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=100)
    reduction: int = Field(default=3, ge=2)
    mode: Literal["max", "min"] | None = None
    teacher: TeacherStop | None = Field(default=None, description="evaluates teachers before their first student is trained")

    def metric_at(self, epoch: int) -> str:
        """The metric at a rung; at epoch 0 the one for teachers."""
        return self.teacher.metric if epoch == 0 and self.teacher else self.metric

    @field_validator("rungs")
    @classmethod
    def _check_rungs_increase(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if list(rungs) != sorted(set(rungs)):
            raise ValueError(f"rungs must increase, and these are {shown(list(rungs))}; write {shown(sorted(set(rungs)))}")
        return rungs


class SpaceFile(StrictSpec):
    """The content of the file; `pair` may contain operators."""

    study: str
    objectives: tuple[Objective, ...] = Field(min_length=1, max_length=20)
    budget: Budget = Budget()
    early_stop: EarlyStop | None = None
    sampler: Literal["balanced", "tpe", "random"] = "balanced"
    seed: Seed = 0
    pair: Mapping[str, Any]
    start_with: tuple[Mapping[str, Any], ...] = Field(default=(), max_length=1000)

    @field_validator("study")
    @classmethod
    def _check_name(cls, study: str) -> str:
        check_study_name(study)
        return study

    @field_validator("start_with")
    @classmethod
    def _check_plain_values(cls, start_with: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
        for entry in start_with:
            try:
                canonical(entry)
            except TypeError as error:
                raise ValueError(str(error)) from error
        return start_with

    @field_validator("objectives")
    @classmethod
    def _check_metrics_unique(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        names = [objective.metric for objective in objectives]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"the objective {shown(twice[0])} is there twice")
        return objectives


def check_study_name(study: str) -> None:
    """Refuses a study's name that cannot be a plain file name.

    Raises:
        ValueError: it contains other characters than A-Z a-z 0-9 . _ -, is too long, or starts with a dot
            or, as an option does, with a dash.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", study):
        raise ValueError(
            f"the study name {shown(study)} may contain only A-Z a-z 0-9 . _ - (and not start with a dot or a dash), "
            "and at most 100 characters"
        )


def read_content(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The plain content of a YAML file, with overrides such as ``transfer.k=500`` applied.

    Raises:
        UserError: the file is missing, is no YAML or no mapping, or an override does not fit it.
    """
    return parse_content(read_text(path), overrides, str(path))


def parse_content(text: str, overrides: list[str], source: str) -> dict[str, Any]:
    """The plain content of a file's text, with overrides applied.

    Raises:
        UserError: it is no YAML or no mapping, or an override does not fit it.
    """
    content = parse_yaml(text, source)
    if not isinstance(content, dict):
        what = "the file is empty" if content is None else "the file has no fields (name: value)"
        raise UserError(what, source, "See search_spaces/quickstart.yaml.")
    names = [override.partition("=")[0] for override in overrides]
    for name, override in zip(names, overrides, strict=True):
        _, equals, value = override.partition("=")
        if names.count(name) > 1:
            raise UserError(f"{shown(name)} is set {names.count(name)} times", "--set", "Keep one of them.")
        if not equals or not all(name.split(".")):
            raise UserError(f"{shown(override)} sets nothing", "--set", "Write --set transfer.k=500.")
        if len(name) > MAX_PATH or name.count(".") >= MAX_DEPTH // 2:
            problem = f"{shown(name)} is no path of a field: it has {counted(name.count('.') + 1, 'step')}"
            raise UserError(problem, "--set", "Write --set transfer.k=500.")
        _apply_override(content, name, parse_yaml(value, f"--set {override}"))
    if overrides and _is_deeper(content, MAX_DEPTH):
        raise UserError(f"more than {MAX_DEPTH} mappings and lists are inside each other", "--set", "Set less deep fields.")
    return content


def _is_deeper(value: Any, most: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most == 0 or any(_is_deeper(item, most - 1) for item in inside)


def _apply_override(content: dict[str, Any], name: str, value: Any) -> None:
    steps = name.split(".")
    if not SpaceFile.model_fields.keys() & content.keys():  # the whole file is a pair
        steps = steps[1:] if steps[0] == "pair" and len(steps) > 1 else steps
        if steps[0] in SpaceFile.model_fields:
            raise UserError(
                f"the file is a pair, and {steps[0]!r} is a field of search spaces",
                f"--set {name}",
                "Set a field of the pair, such as --set transfer.k=500.",
            )
    node: Any = content["pair"] if "pair" in content and steps[0] not in SpaceFile.model_fields else content
    for index, step in enumerate(steps):
        parent, key, old = _step_into(node, step, ".".join(steps[:index]) or "the pair", f"--set {name}")
        if index == len(steps) - 1:
            parent[key] = _value_or_branch(old, value, f"--set {name}")
        else:
            if old is None:
                parent[key] = old = {}
            node = old


def _step_into(node: Any, step: str, above: str, where: str) -> tuple[Any, str | int, Any]:
    """Container, key and current value (None if absent) for one step of a path; paths name branches without `one_of`."""
    operator = next((key for key in node if key in OPERATORS), None) if isinstance(node, dict) else None
    if operator == "one_of":
        node = node["one_of"]
        if not isinstance(node, dict):
            raise UserError(f"the 'one_of' of {above} is {shown(node)} and has no branches", where, "Mend it in the file.")
        if step not in node:
            raise UserError(f"{above} has no branch {step!r}", where, f"Its branches are {first_few(node)}.")
    elif operator:
        raise UserError(f"{above} is drawn as a whole ({operator})", where, f"Set {above} itself.")
    if isinstance(node, list):
        if not (step.isascii() and step.isdigit()) or int(step) >= len(node):
            raise UserError(f"{above} is a list of {len(node)} without an entry {step!r}", where, "Entries are 0, 1, ...")
        return node, int(step), node[int(step)]
    if not isinstance(node, dict):
        raise UserError(f"{above} is {shown(node)} and has no {step!r}", where, f"Set {above} to a mapping.")
    return node, step, node.get(step)


def _value_or_branch(old: Any, value: Any, where: str) -> Any:
    """`value`; if it names a branch of a one_of, the one_of with only that branch, so that its parameters keep their names."""
    branches = old.get("one_of") if isinstance(old, dict) else None
    if not isinstance(branches, dict) or not isinstance(value, str):
        return value
    if value not in branches:
        raise UserError(f"there is no branch {shown(value)}", where, f"Branches are {first_few(branches)}.")
    return {"one_of": {value: branches[value]}}


def parse_fields(content: Mapping[str, Any], source: str) -> SpaceFile:
    """The content of a space's file as specs.

    Raises:
        UserError: fields are unknown, missing or invalid; the message suggests corrections.
    """
    try:
        return SpaceFile.model_validate(content)
    except ValidationError as error:
        found = spec_errors.problems_from_validation(error, SpaceFile, content, lambda path: ".".join(map(str, path)))
        spec_errors.raise_if_any(found, source)
        raise AssertionError("unreachable: a validation error has problems") from error
