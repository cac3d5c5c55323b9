"""Checks a space: the pairs of every branch at the ends of every range, objectives, rungs, planned draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from ktray import plugins
from ktray.search import space_tree, spec_errors
from ktray.search.space_file import EarlyStop, TeacherStop
from ktray.search.spec_errors import SpecError, nearest
from ktray.spec import PairSpec

if TYPE_CHECKING:
    from ktray.search.space import Space

Mode = Literal["max", "min"]
COST_METRICS: dict[str, Mode | None] = {"cost/seconds": "min", "cost/marginal_seconds": "min", "student/parameters": None}


def checked(space: Space) -> Space:
    """The space with the modes of its metrics filled in.

    Raises:
        UserError: the first five things that are wrong with it.
    """
    found, pairs = _checked_pairs(space)
    if not found:
        found = [*_objectives(space, pairs), *_early_stop(space, pairs), *_start_with(space)]
    spec_errors.raise_if_any(found, space.source)
    modes = metrics(next(iter(pairs.values())))
    objectives = tuple(
        typed.model_copy(update={"mode": typed.mode or modes[typed.metric] or "min"}) for typed in space.document.objectives
    )
    stop = space.early_stop
    if stop is not None:
        judge = stop.teacher and stop.teacher.model_copy(update={"mode": modes[stop.teacher.metric]})
        stop = stop.model_copy(update={"mode": modes[stop.metric], "teacher": judge})
    return replace(space, document=space.document.model_copy(update={"objectives": objectives, "early_stop": stop}))


def metrics(pair: PairSpec) -> dict[str, Mode | None]:
    """Name -> better direction of every metric that a search over this pair can use; None: as the user says."""
    found = dict(COST_METRICS)
    for entry in pair.evals:
        directions: Mapping[str, Mode] = plugins.module_of("evaluation", entry).DIRECTION
        found.update({f"{_evaluation_name(entry)}/{metric}": mode for metric, mode in directions.items()})
    return found


def _evaluation_name(entry: Any) -> str:
    return str(entry.name or entry.kind)


def _checked_pairs(space: Space) -> tuple[list[SpecError], dict[str, PairSpec]]:
    """What is wrong with the boundary draws, each thing once; and label -> pair of those that are valid."""
    found: dict[SpecError, None] = {}
    pairs: dict[str, PairSpec] = {}
    for label, params in space.boundary_draws():
        value = space.plain(params)
        try:
            pairs[label] = PairSpec.model_validate(value)
        except ValidationError as error:
            where = lambda path, params=params: space.place(path, params)  # noqa: E731 - bound to this draw
            found.update(dict.fromkeys(spec_errors.from_validation(error, PairSpec, value, where)))
    return list(found), pairs


def _objectives(space: Space, pairs: Mapping[str, PairSpec]) -> Iterator[SpecError]:
    for index, objective in enumerate(space.document.objectives):
        where = f"objectives.{index}"
        missing = _unknown_metric(objective.metric, pairs, where)
        if missing:
            yield missing
            continue
        mode = metrics(next(iter(pairs.values())))[objective.metric]
        if objective.mode and mode and objective.mode != mode:
            better = "larger" if mode == "max" else "smaller"
            yield SpecError(where, f"{objective.metric} is better when {better}", f"Write mode: {mode}.")
    for label, pair in pairs.items():
        on_test = [_evaluation_name(entry) for entry in pair.evals if getattr(entry, "split", "val") == "test"]
        if on_test:
            yield SpecError(
                "pair.evals",
                f"{on_test[0]} judges on test, and a search that chooses by test has no test left ({label})",
                "Leave 'split' out; `ktray best NAME --test` judges the winners on test.",
            )
            return


def _unknown_metric(metric: str, pairs: Mapping[str, PairSpec], where: str) -> SpecError | None:
    for label, pair in pairs.items():
        known = metrics(pair)
        if metric not in known:
            near = nearest(metric, list(known))
            also = "" if len(pairs) == 1 else f" ({label})"
            return SpecError(
                where, f"no evaluation of the pair gives {metric!r}{also}", f"{near}Known: {', '.join(sorted(known))}."
            )
    return None


def _early_stop(space: Space, pairs: Mapping[str, PairSpec]) -> Iterator[SpecError]:
    stop = space.early_stop
    if stop is None:
        return
    missing = _unknown_metric(stop.metric, pairs, "early_stop.metric")
    if missing or stop.metric in COST_METRICS:
        yield missing or SpecError("early_stop.metric", f"{stop.metric} judges no student", "Name a metric of an evaluation.")
        return
    teacher = next((e for p in pairs.values() for e in p.evals if _judges(e, stop.metric) == "teacher"), None)
    if teacher is not None:
        yield SpecError(
            "early_stop.metric", f"{stop.metric} judges the teacher, and is the same at every rung", "Judge the student."
        )
    mode = metrics(next(iter(pairs.values())))[stop.metric]
    if stop.mode and stop.mode != mode:
        yield SpecError("early_stop.mode", f"the better direction of {stop.metric} is {mode!r}", "Leave 'mode' out.")
    yield from _rungs(stop, pairs)
    if stop.teacher is not None:
        yield from _teacher_stop(stop.teacher, pairs)


def _teacher_stop(stop: TeacherStop, pairs: Mapping[str, PairSpec]) -> Iterator[SpecError]:
    missing = _unknown_metric(stop.metric, pairs, "early_stop.teacher.metric")
    right = "Add an evaluation such as {kind: knn, of: teacher, name: teacher_knn}."
    if missing or stop.metric in COST_METRICS:
        yield missing or SpecError("early_stop.teacher.metric", f"{stop.metric} judges no teacher", right)
        return
    student = next((e for p in pairs.values() for e in p.evals if _judges(e, stop.metric) not in (None, "teacher")), None)
    if student is not None:
        yield SpecError(
            "early_stop.teacher.metric", f"{stop.metric} judges the {student.of}, and a teacher is to be judged", right
        )
    mode = metrics(next(iter(pairs.values())))[stop.metric]
    if stop.mode and stop.mode != mode:
        yield SpecError("early_stop.teacher.mode", f"the better direction of {stop.metric} is {mode!r}", "Leave 'mode' out.")


def _judges(entry: Any, metric: str) -> str | None:
    return entry.of if metric.split("/")[0] == _evaluation_name(entry) else None


def _rungs(stop: EarlyStop, pairs: Mapping[str, PairSpec]) -> Iterator[SpecError]:
    longest = max(pair.student.schedule.epochs for pair in pairs.values())
    if longest != stop.rungs[-1]:
        right = [rung for rung in stop.rungs if rung < longest] + [longest]
        yield SpecError(
            "early_stop.rungs",
            f"the last rung is {stop.rungs[-1]}, and the longest student trains {longest} epochs",
            f"The last rung is the full training: write {right}.",
        )


def _start_with(space: Space) -> Iterator[SpecError]:
    known: dict[str, list[tuple[space_tree.Parameter, space_tree.Params]]] = {}
    for parameter, under in space_tree.parameters(space.root):
        known.setdefault(parameter.name, []).append((parameter, under))
    for index, entry in enumerate(space.start_with):
        found = list(_invalid_entries(entry, known, f"start_with.{index}"))
        yield from found or _invalid_pair(space, entry, f"start_with.{index}")


def _invalid_entries(
    entry: space_tree.Params, known: Mapping[str, list[tuple[space_tree.Parameter, space_tree.Params]]], place: str
) -> Iterator[SpecError]:
    for name, value in entry.items():
        where = f"{place}.{name}"
        if name not in known:
            listed = f"Parameters: {', '.join(known)}." if known else "The space has no parameters."
            yield SpecError(where, f"there is no parameter {name!r}", nearest(name, list(known)) + listed)
            continue
        parameter, under = known[name][0]
        wrong = space_tree.invalid_reason(parameter, value)
        if wrong:
            yield SpecError(where, *wrong)
        elsewhere = {branch: choice for branch, choice in under.items() if entry.get(branch) != choice}
        if elsewhere:
            branch, choice = next(iter(elsewhere.items()))
            yield SpecError(where, f"{name} exists only in the branch {choice!r}", f"Add {branch}: {choice}.")


def _invalid_pair(space: Space, entry: space_tree.Params, where: str) -> Iterator[SpecError]:
    """Values that are each valid in a boundary draw may be invalid together."""
    params = space.complete(entry)
    value = space.plain(params)
    try:
        PairSpec.model_validate(value)
    except ValidationError as error:
        found = spec_errors.from_validation(error, PairSpec, value, lambda path: space.place(path, params))
        yield from (SpecError(f"{where}: {each.where}", each.problem, each.instead) for each in found)
