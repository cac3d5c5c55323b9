"""Checks a space: the pairs of every branch at both ends of every range, the objectives, the rungs and the planned draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from ktray import plugins
from ktray.errors import UserError
from ktray.search import space_tree, spec_errors
from ktray.search.space_file import EarlyStop, TeacherStop
from ktray.search.spec_errors import SpecProblem, suggestion
from ktray.spec import PairSpec
from ktray.text import first_few, shown

if TYPE_CHECKING:
    from ktray.search.space import Space

Mode = Literal["max", "min"]
MAX_PAIRS = 3000  # each costs a millisecond or more, several times
COST_METRICS: dict[str, Mode | None] = {"cost/seconds": "min", "cost/marginal_seconds": "min", "student/parameters": None}


def check_and_fill_modes(space: Space) -> Space:
    """Checks a space and returns it with the modes of its metrics filled in.

    Raises:
        UserError: up to five errors in it.
    """
    if sum(1 for _ in itertools.islice(space.boundary_draws(), MAX_PAIRS + 1)) > MAX_PAIRS:
        raise UserError(
            f"the space has more than {MAX_PAIRS:,} pairs to check: every option and both ends of every range, in every "
            "combination of branches",
            f"{space.source}: pair",
            "Use fewer options and branches; for numbers write {int: [1, 9]} or {float: [0, 1]}.",
        )
    found, pairs = _validate_boundary_draws(space)
    if not found:
        found = [*_objective_problems(space, pairs), *_early_stop_problems(space, pairs), *_problems_of_start_with(space)]
    spec_errors.raise_if_any(found, space.source)
    modes = metric_directions(next(iter(pairs.values())))
    objectives = tuple(
        typed.model_copy(update={"mode": typed.mode or modes[typed.metric]}) for typed in space.document.objectives
    )
    stop = space.early_stop
    if stop is not None:
        teacher_stop = stop.teacher and stop.teacher.model_copy(update={"mode": modes[stop.teacher.metric]})
        stop = stop.model_copy(update={"mode": modes[stop.metric], "teacher": teacher_stop})
    return replace(space, document=space.document.model_copy(update={"objectives": objectives, "early_stop": stop}))


def metric_directions(pair: PairSpec) -> dict[str, Mode | None]:
    """Every metric that a search over this pair can use -> its better direction; None if only the user can decide."""
    found = dict(COST_METRICS)
    for entry in pair.evals:
        module = plugins.module_of("evaluation", entry)
        directions: Mapping[str, Mode] = module.directions(entry) if hasattr(module, "directions") else module.DIRECTION
        found.update({f"{_evaluation_name(entry)}/{metric}": mode for metric, mode in directions.items()})
    return found


def _evaluation_name(entry: Any) -> str:
    return str(entry.name or entry.kind)


def _validate_boundary_draws(space: Space) -> tuple[list[SpecProblem], dict[str, PairSpec]]:
    """The distinct errors of the boundary draws; label -> pair of the valid ones."""
    found: dict[SpecProblem, None] = {}
    pairs: dict[str, PairSpec] = {}
    for label, params in space.boundary_draws():
        value = space.plain_pair(params)
        try:
            pairs[label] = PairSpec.model_validate(value)
        except ValidationError as error:
            where = lambda path, params=params: space.path_in_file(path, params)  # noqa: E731 - bound to this draw
            found.update(dict.fromkeys(spec_errors.problems_from_validation(error, PairSpec, value, where)))
    return list(found), pairs


def _objective_problems(space: Space, pairs: Mapping[str, PairSpec]) -> Iterator[SpecProblem]:
    for index, objective in enumerate(space.document.objectives):
        where = f"objectives.{index}"
        missing = _unknown_metric_problem(objective.metric, pairs, where)
        if missing:
            yield missing
            continue
        mode = metric_directions(next(iter(pairs.values())))[objective.metric]
        if objective.mode and mode and objective.mode != mode:
            better = "larger" if mode == "max" else "smaller"
            yield SpecProblem(where, f"{objective.metric} is better when {better}", f"Write mode: {mode}.")
        elif not objective.mode and not mode:
            problem = f"whether a larger or a smaller {objective.metric} is better is not known"
            yield SpecProblem(where, problem, "Write mode: min if less is better, or mode: max.")
    for label, pair in pairs.items():
        on_test = [_evaluation_name(entry) for entry in pair.evals if getattr(entry, "split", "val") == "test"]
        if on_test:
            yield SpecProblem(
                "pair.evals",
                f"{on_test[0]} evaluates on test, and a search that selects on test has no independent test left ({label})",
                "Leave 'split' out; `ktray best NAME --test` evaluates the winners on test.",
            )
            return


def _unknown_metric_problem(metric: str, pairs: Mapping[str, PairSpec], where: str) -> SpecProblem | None:
    for label, pair in pairs.items():
        known = metric_directions(pair)
        if metric not in known:
            hint = suggestion(metric, list(known))
            also = "" if len(pairs) == 1 else f" ({label})"
            return SpecProblem(
                where, f"no evaluation of the pair gives {shown(metric)}{also}", f"{hint}Known: {first_few(sorted(known))}."
            )
    return None


def _early_stop_problems(space: Space, pairs: Mapping[str, PairSpec]) -> Iterator[SpecProblem]:
    stop = space.early_stop
    if stop is None:
        return
    missing = _unknown_metric_problem(stop.metric, pairs, "early_stop.metric")
    if missing or stop.metric in COST_METRICS:
        yield missing or SpecProblem(
            "early_stop.metric", f"{stop.metric} does not evaluate the student", "Name a metric of an evaluation."
        )
        return
    teacher = next((e for p in pairs.values() for e in p.evals if _evaluation_target(e, stop.metric) == "teacher"), None)
    if teacher is not None:
        yield SpecProblem(
            "early_stop.metric", f"{stop.metric} evaluates the teacher and is the same at every rung", "Evaluate the student."
        )
    mode = metric_directions(next(iter(pairs.values())))[stop.metric]
    if stop.mode and stop.mode != mode:
        yield SpecProblem("early_stop.mode", f"the better direction of {stop.metric} is {mode!r}", "Leave 'mode' out.")
    yield from _rung_problems(stop, pairs)
    if stop.teacher is not None:
        yield from _teacher_stop_problems(stop.teacher, pairs)


def _teacher_stop_problems(stop: TeacherStop, pairs: Mapping[str, PairSpec]) -> Iterator[SpecProblem]:
    missing = _unknown_metric_problem(stop.metric, pairs, "early_stop.teacher.metric")
    right = "Add an evaluation such as {kind: knn, of: teacher, name: teacher_knn}."
    if missing or stop.metric in COST_METRICS:
        yield missing or SpecProblem("early_stop.teacher.metric", f"{stop.metric} does not evaluate the teacher", right)
        return
    student = next(
        (e for p in pairs.values() for e in p.evals if _evaluation_target(e, stop.metric) not in (None, "teacher")), None
    )
    if student is not None:
        yield SpecProblem("early_stop.teacher.metric", f"{stop.metric} evaluates the {student.of}, not the teacher", right)
    mode = metric_directions(next(iter(pairs.values())))[stop.metric]
    if stop.mode and stop.mode != mode:
        yield SpecProblem("early_stop.teacher.mode", f"the better direction of {stop.metric} is {mode!r}", "Leave 'mode' out.")


def _evaluation_target(entry: Any, metric: str) -> str | None:
    """What an evaluation of this metric evaluates, "student" or "teacher"; None if the metric is another evaluation's."""
    return entry.of if metric.split("/")[0] == _evaluation_name(entry) else None


def _rung_problems(stop: EarlyStop, pairs: Mapping[str, PairSpec]) -> Iterator[SpecProblem]:
    longest = max(pair.student.schedule.epochs for pair in pairs.values())
    if longest != stop.rungs[-1]:
        right = [rung for rung in stop.rungs if rung < longest] + [longest]
        yield SpecProblem(
            "early_stop.rungs",
            f"the last rung is {stop.rungs[-1]}, and the longest student trains {longest} epochs",
            f"The last rung is the full training: write {right}.",
        )


def _problems_of_start_with(space: Space) -> Iterator[SpecProblem]:
    known: dict[str, list[tuple[space_tree.Parameter, space_tree.Params]]] = {}
    for parameter, conditions in space_tree.parameters_with_conditions(space.root):
        known.setdefault(parameter.name, []).append((parameter, conditions))
    for index, entry in enumerate(space.start_with):
        found = list(_problems_of_start_with_entry(entry, known, f"start_with.{index}"))
        yield from found or _planned_pair_problems(space, entry, f"start_with.{index}")


def _problems_of_start_with_entry(
    entry: space_tree.Params, known: Mapping[str, list[tuple[space_tree.Parameter, space_tree.Params]]], location: str
) -> Iterator[SpecProblem]:
    for name, value in entry.items():
        where = f"{location}.{name}"
        if name not in known:
            right = f"Parameters: {first_few(known)}." if known else "The space has no parameters."
            yield SpecProblem(where, f"there is no parameter {shown(name)}", suggestion(name, list(known)) + right)
            continue
        parameter, conditions = known[name][0]
        problem = space_tree.value_problem(parameter, value)
        if problem:
            yield SpecProblem(where, *problem)
        unmet = {branch: choice for branch, choice in conditions.items() if entry.get(branch) != choice}
        if unmet:
            branch, choice = next(iter(unmet.items()))
            yield SpecProblem(where, f"{name} exists only in the branch {choice!r}", f"Add {branch}: {choice}.")


def _planned_pair_problems(space: Space, entry: space_tree.Params, where: str) -> Iterator[SpecProblem]:
    """The errors of a planned draw: values that are valid in boundary draws may be an invalid combination."""
    params = space.fill_with_first_values(entry)
    value = space.plain_pair(params)
    try:
        PairSpec.model_validate(value)
    except ValidationError as error:
        found = spec_errors.problems_from_validation(error, PairSpec, value, lambda path: space.path_in_file(path, params))
        yield from (SpecProblem(f"{where}: {error.where}", error.problem, error.instead) for error in found)
