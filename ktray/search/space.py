"""A search space: the pairs that a search can draw, read from a YAML file.

The name of a parameter is its dotted path in the pair (`transfer.k`). Inside a branch the path contains the branch's name
(`teacher.rotation.layer`), and the choice of the branch is the parameter `teacher`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ktray import plugins
from ktray.errors import UserError
from ktray.fingerprint import flat
from ktray.search import space_check, space_file, space_tree, spec_errors
from ktray.search.space_file import Budget, EarlyStop, SpaceFile
from ktray.search.space_tree import Ask, Choice, OneOf, Params, Range, Scalar
from ktray.search.spec_errors import SpecProblem
from ktray.spec import TOLERANCE, PairSpec
from ktray.text import first_few, shown

MAX_SHARED_VALUES = 10  # values of an integer parameter of the prefix; with more, two draws hardly ever share a prefix
SEARCH_FIELDS = frozenset({"study", "objectives", "budget", "early_stop", "sampler", "start_with"})  # none is a field of pairs
ABSENT = "absent"
MAX_BRANCH_COMBINATIONS = 512  # of which boundary draws are made; further ones only for branches that are in none of these
MAX_PARAMETERS = 1000


@dataclass(frozen=True)
class Space:
    """A search space and the settings of its search; create it with `load`."""

    document: SpaceFile
    root: Any
    source: str

    @classmethod
    def from_content(cls, content: Mapping[str, Any], source: str) -> Space:
        """The space of a file's plain content. Checks its fields and operators, but not its pairs, as `load` does.

        Raises:
            UserError: fields or operators are invalid.
        """
        document = space_file.parse_fields(content, source)
        found: list[SpecProblem] = []
        root = space_tree.parse_tree(document.pair, (), found)
        if not found and sum(1 for _ in space_tree.parameters_with_conditions(root)) > MAX_PARAMETERS:
            found.append(SpecProblem("pair", f"it has more than {MAX_PARAMETERS:,} parameters", "Search fewer at a time."))
        spec_errors.raise_if_any(found, source)
        return cls(document, root, source)

    @cached_property
    def content(self) -> dict[str, Any]:
        """The fields of its file as plain JSON values, defaults included; `from_content` reads it back."""
        return self.document.model_dump(mode="json")

    @property
    def study_name(self) -> str:
        """The study's name."""
        return self.document.study

    @property
    def budget(self) -> Budget:
        return self.document.budget

    @property
    def objectives(self) -> tuple[tuple[str, Literal["max", "min"]], ...]:
        """(metric, mode) of what is optimised, the most important first."""
        return tuple((objective.metric, objective.mode or "max") for objective in self.document.objectives)

    @property
    def early_stop(self) -> EarlyStop | None:
        return self.document.early_stop

    @property
    def sampler_name(self) -> Literal["balanced", "tpe", "random"]:
        """The method that proposes draws."""
        return self.document.sampler

    @property
    def seed(self) -> int:
        """Seed of the search; the seeds of data, teacher and student are part of the pair."""
        return self.document.seed

    @property
    def start_with(self) -> tuple[Params, ...]:
        """Parameters of the first draws, as labels; the sampler chooses those that are left out."""
        return tuple(
            {str(name): space_tree.scalar_of(value) for name, value in entry.items()} for entry in self.document.start_with
        )

    def build_draw(self, ask: Ask) -> Params:
        """One draw, define-by-run: calls `ask` for each parameter of the chosen branches, in the order of the file."""
        params: Params = {}
        space_tree.fill_params(self._parameter_tree, ask, params)
        return params

    @cached_property
    def _parameter_tree(self) -> Any:
        """The tree without constants, for speed: a sampler makes many draws, and most of a pair is constant."""
        return space_tree.without_constants(self.root)

    @cached_property
    def prefix_parameters(self) -> frozenset[str]:
        """See `prefix_parameters`."""
        return prefix_parameters(self.root)

    @cached_property
    def teacher_parameters(self) -> frozenset[str]:
        """See `teacher_parameters`."""
        return teacher_parameters(self.root)

    def params_of_prefix(self, params: Mapping[str, Scalar]) -> Params:
        """Those of `params` that determine the prefix: what is computed before the student."""
        return {name: value for name, value in params.items() if name in self.prefix_parameters}

    def fill_with_first_values(self, params: Mapping[str, Scalar]) -> Params:
        """`params`, with the first option or the lower end for each parameter that is left out."""
        return self.build_draw(lambda parameter: params.get(parameter.name, space_tree.values_to_check(parameter)[0]))

    def plain_pair(self, params: Mapping[str, Scalar]) -> dict[str, Any]:
        """The pair with these parameters, as plain data before validation."""
        value: dict[str, Any] = space_tree.substitute(self.root, params)
        return value

    def pair(self, params: Mapping[str, Scalar]) -> PairSpec:
        """The pair with these parameters.

        Raises:
            UserError: the combination is no valid pair.
        """
        value = self.plain_pair(params)
        try:
            return PairSpec.model_validate(value)
        except ValidationError as error:
            found = spec_errors.problems_from_validation(error, PairSpec, value, lambda path: self.path_in_file(path, params))
            spec_errors.raise_if_any(found, self.source)
            raise AssertionError("unreachable: a validation error has problems") from error

    def path_in_file(self, path: spec_errors.Path, params: Mapping[str, Scalar]) -> str:
        """Dotted path in the file of a field of the pair with these parameters: ``pair.teacher.hog.descriptor.cell``."""
        node, steps = self.root, ["pair"]
        for step in path:
            while isinstance(node, space_tree.OneOf):
                branch = str(params[node.choice.name])
                steps.append(branch)
                node = node.branches[branch]
            steps.append(str(step))
            if isinstance(node, dict):
                node = node.get(str(step))
            elif isinstance(node, list) and isinstance(step, int) and step < len(node):
                node = node[step]
            else:
                node = None
        if isinstance(node, space_tree.OneOf):
            steps.append(str(params[node.choice.name]))
        return ".".join(steps)

    def draw_count(self) -> int | None:
        """Number of different draws; None if a parameter is continuous."""
        return space_tree.draw_count(self.root)

    def all_draws(self) -> Iterator[Params]:
        """Every draw of a finite space, in the order of the file.

        Raises:
            ValueError: a parameter is continuous.
        """
        if self.draw_count() is None:
            raise ValueError("the draws of a continuous space cannot be listed")
        return space_tree.combinations(self.root, lambda parameter: space_tree.all_values(parameter) or ())

    def boundary_draws(self) -> Iterator[tuple[str, Params]]:
        """Labelled draws that cover every branch, every option and both ends of every range, varying one parameter at a time.

        The labels are ``teacher=hog`` for the first of each combination of branches, then ``teacher=hog: transfer.k=500``.
        """
        known = {parameter.name: parameter for parameter, _ in space_tree.parameters_with_conditions(self.root)}
        for base in self._branch_combinations():
            branches = {name: value for name, value in base.items() if space_tree.chooses_branch(known[name])}
            head = ", ".join(f"{name}={value}" for name, value in branches.items()) or "the pair"
            yield head, base
            for name in [name for name in base if name not in branches]:
                for value in space_tree.values_to_check(known[name])[1:]:
                    yield f"{head}: {name}={value}", {**base, name: value}

    def _branch_combinations(self) -> Iterator[Params]:
        """The first `MAX_BRANCH_COMBINATIONS` of all, with first values elsewhere; then one for each branch that is in none."""
        every = space_tree.combinations(self.root, lambda parameter: space_tree.values_to_check(parameter)[:1])
        unseen = {
            (parameter.name, branch): conditions
            for parameter, conditions in space_tree.parameters_with_conditions(self.root)
            if space_tree.chooses_branch(parameter)
            for branch in space_tree.values_to_check(parameter)
        }
        for base in itertools.islice(every, MAX_BRANCH_COMBINATIONS):
            for item in base.items():
                unseen.pop(item, None)
            yield base
        while unseen:
            (name, branch), conditions = next(iter(unseen.items()))
            base = self.fill_with_first_values({**conditions, name: branch})
            for item in base.items():
                unseen.pop(item, None)
            yield base

    def branch_draws(self) -> Iterator[tuple[str, Params]]:
        """The first of `boundary_draws`, and each further one that covers a branch for the first time."""
        branches = [
            parameter
            for parameter, _ in space_tree.parameters_with_conditions(self.root)
            if space_tree.chooses_branch(parameter)
        ]
        unseen = {(parameter.name, value) for parameter in branches for value in space_tree.values_to_check(parameter)}
        for number, (label, params) in enumerate(self.boundary_draws()):
            shown = unseen & set(params.items())
            if shown or number == 0:
                unseen -= shown
                yield label, params

    def sharing_warnings(self) -> list[str]:
        """Warnings about parameters that make sharing impossible, because every draw has another prefix."""
        found = []
        for parameter, _ in space_tree.parameters_with_conditions(self.root):
            part = parameter.name.split(".")[0]
            values = space_tree.all_values(parameter)
            many = isinstance(parameter, space_tree.Range) and (not values or len(values) > MAX_SHARED_VALUES)
            if many and parameter.name in self.prefix_parameters:
                what = {"teacher": "teacher", "transfer": "clustering", "data": "data set"}.get(part, part)
                shape = "continuous" if values is None else f"one of {len(values)} values"
                found.append(f"pair.{parameter.name} is {shape}: every draw is a new {what}; use choice so that draws share it")
        return found

    def resume_relevant_fields(self) -> dict[str, Any]:
        """The part of the space that must stay the same for a study to be resumed: all but its name, budget and sampler.

        Budget and sampler only decide which pairs are tried next, so the results so far stay valid when these change.
        """
        return self.document.model_dump(mode="json", exclude={"study", "budget", "sampler"})

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """Differences from an earlier document of this space, such as ``pair.transfer.k.choice was [5, 10], is [5]``.

        How many unreadable images are tolerated is none: it changes no result as long as the images are accepted.
        """
        before, now = (
            flat(Space.from_content(earlier, self.source).resume_relevant_fields()),
            flat(self.resume_relevant_fields()),
        )
        changed = [
            path
            for path in sorted(before.keys() | now.keys())
            if before.get(path, ABSENT) != now.get(path, ABSENT) and path.rpartition(".")[2] != TOLERANCE
        ]
        return [f"{path} was {before.get(path, ABSENT)!r}, is {now.get(path, ABSENT)!r}" for path in changed]


def load(path: Path, overrides: list[str]) -> Space:
    """The search space of a YAML file; checks every branch at both ends of every range.

    Args:
        overrides: such as ``transfer.k=500``.

    Raises:
        UserError: up to five errors, each with file, dotted path, problem and correction.
    """
    return _checked_space(space_file.read_content(path, overrides), str(path), path.name)


def parse(text: str, overrides: list[str], source: str) -> Space:
    """The search space of a file's text, checked as in `load`.

    Args:
        source: name of the file in error messages.

    Raises:
        UserError: as in `load`.
    """
    return _checked_space(space_file.parse_content(text, overrides, source), source, source)


def _checked_space(content: Mapping[str, Any], path: str, source: str) -> Space:
    if not SEARCH_FIELDS & content.keys():
        raise UserError("this is a pair, not a search space", path, f"Use ktray run {path}.")
    return space_check.check_and_fill_modes(Space.from_content(content, source))


def is_space(path: Path) -> bool:
    """Whether a YAML file describes a search space rather than pairs.

    Raises:
        UserError: the file cannot be read.
    """
    content = space_file.read_content(path, [])
    return bool(SEARCH_FIELDS & content.keys())


def load_named_pair(path: Path, overrides: list[str]) -> dict[str, PairSpec]:
    """Name of a YAML file without its suffix -> its pair, which is the whole file or its field `pair`.

    Raises:
        UserError: the file is a space, contains operators, or is no valid pair.
    """
    if is_space(path):
        raise UserError("this is a search space, not a pair", str(path), f"Use ktray search {path}.")
    content = space_file.read_content(path, overrides)
    return {path.stem: parse_pair(content, path.name)}


def parse_pair(content: Mapping[str, Any], source: str) -> PairSpec:
    """The pair that is all of `content` or its field `pair`.

    Raises:
        UserError: it contains operators, or is no valid pair.
    """
    if "pair" in content and len(content) > 1:
        others = first_few(shown(key) for key in content if key != "pair")
        raise UserError(f"beside 'pair' there is {others}", source, "The file of a pair has no other field than 'pair'.")
    try:
        return _pair_that_draws_nothing(content.get("pair", content), source)
    except UserError as error:
        if "pair" in content:
            raise
        where, entries = error.where.replace(": pair.", ": ", 1), (entry.replace("- pair.", "- ", 1) for entry in error.entries)
        raise UserError(error.problem, where, error.instead, tuple(entries)) from error


def _pair_that_draws_nothing(pair: Any, source: str) -> PairSpec:
    """The pair of a space that draws nothing; errors name its fields as in the file of a space."""
    space = Space.from_content({"study": "pair", "objectives": [{"metric": "none"}], "pair": pair}, source)
    drawn = next(space_tree.parameters_with_conditions(space.root), None)
    if drawn:
        raise UserError("a single pair draws nothing", f"{source}: pair.{drawn[0].name}", "Write the value itself.")
    return space.pair({})


FieldPath = tuple[str, ...]
"""Fields from the pair down, without the names of branches: ``("transfer", "k")``."""


def prefix_parameters(root: Any) -> frozenset[str]:
    """Names of the parameters that determine what is computed before the student.

    These are all parameters except those of the student, of the evaluations, and of transfer fields that only the student
    reads, such as a temperature: fields that the `NEEDS` of the transfer do not list.

    Args:
        root: the tree of a space.
    """
    return frozenset(name for name, path, before in _parameter_paths(root, (), frozenset()) if _decides_prefix(path, before))


def teacher_parameters(root: Any) -> frozenset[str]:
    """Names of the parameters that determine which teacher is trained, and on what data."""
    return frozenset(name for name, path, _ in _parameter_paths(root, (), frozenset()) if path[:1] in (("data",), ("teacher",)))


def _decides_prefix(path: FieldPath, before: frozenset[str]) -> bool:
    part, *fields = path or ("",)
    if part in ("student", "evals"):
        return False
    return part != "transfer" or not fields or fields[0] == "kind" or fields[0] in before


def _parameter_paths(node: Any, path: FieldPath, before: frozenset[str]) -> Iterator[tuple[str, FieldPath, frozenset[str]]]:
    """(name, path, transfer fields that stages before the student read) of each parameter below a node."""
    if isinstance(node, OneOf):
        yield node.choice.name, path, before
        for body in node.branches.values():
            yield from _parameter_paths(body, path, before)
    elif isinstance(node, Choice | Range):
        yield node.name, path, before
    elif isinstance(node, dict):
        if path == ("transfer",):
            before = _transfer_fields_of_prefix(node)
        for key, child in node.items():
            yield from _parameter_paths(child, (*path, key), before)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _parameter_paths(child, (*path, str(index)), before)


def _transfer_fields_of_prefix(transfer: Mapping[str, Any]) -> frozenset[str]:
    kind = transfer.get("kind")
    kinds: Iterable[Any] = kind.options if isinstance(kind, Choice) else [kind]
    needs = [plugins.module("transfer", str(each)).NEEDS for each in kinds]
    return frozenset(field for need in needs for fields in need.values() for field in fields)
