"""Warm start: results of other studies as observations for the sampler of a new one, at the rungs that they reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ktray.errors import UserError
from ktray.search import space_tree
from ktray.search.history import StudySnapshot, read_study
from ktray.search.space import Space
from ktray.search.space_tree import Params
from ktray.search.trial import Trial

NOTE = "warm_start"  # name of the journal's note: other study -> its results when it was first given
Noted = Mapping[str, list[dict[str, Any]]]


def add_results_of(other: str, noted: Noted, home: Path, space: Space, name: str) -> Noted:
    """The note with the results of `other` added. Results in the note never change, so that a resumed search draws the same.

    Args:
        other: a study of the same home.
        name: the study that begins.

    Raises:
        UserError: there is no such study, it is the same one, or none of its results apply.
    """
    if other in noted:
        return noted
    if other == name:
        raise UserError(f"the study {name!r} cannot start from its own results", "--warm-start", "The same name resumes it.")
    found = applicable_results(space, read_study(home, other))
    if not found:
        raise UserError(
            f"no result of the study {other!r} applies to this space",
            "--warm-start",
            "The two need a common parameter, and an objective or rung metric from the same evaluation on the same data.",
        )
    return {**noted, other: found}


def observation_trials(noted: Noted) -> list[Trial]:
    """The results in the note as trials for the sampler; their numbers are below 0, the latest is -1."""
    every = [result for found in noted.values() for result in found]
    return [_trial_from_result(result, index - len(every)) for index, result in enumerate(every)]


def applicable_results(space: Space, other: StudySnapshot) -> list[dict[str, Any]]:
    """Results of another study that apply to this space, as JSON values.

    A parameter is kept if it exists in this space, in the same branch, and allows the value. A completed trial counts as
    completed if its student had as many epochs as one has here; otherwise its scores at rungs count. Metrics from another
    evaluation, or from the same one on other data, are left out.
    """
    return [result for trial in other.trials if (result := _applicable_result(space, other, trial)) is not None]


def _applicable_result(space: Space, other: StudySnapshot, trial: Trial) -> dict[str, Any] | None:
    params = _applicable_params(space, trial.params)
    if (
        not params
        or trial.state in ("failed", "duplicate")
        or (trial.last_rung_and_score is None and trial.state != "completed")
    ):
        return None
    try:
        pair = space.pair(space.fill_with_first_values(params)).model_dump(mode="json")
    except UserError:
        return None
    same = _same_evaluation_check(pair, trial.pair)
    epochs = pair["student"]["schedule"]["epochs"]
    objectives = [metric for metric, _ in space.objectives]
    if trial.state == "completed" and trial.total_epochs == epochs and all(same(m) and m in trial.metrics for m in objectives):
        return {"state": "completed", "params": params, "objectives": {metric: trial.metrics[metric] for metric in objectives}}
    stop, theirs = space.early_stop, other.space.early_stop
    scores: dict[str, float] = {}
    teacher_score = None
    if stop and same(stop.metric):
        at_rungs = trial.scores if theirs and theirs.metric == stop.metric else {}
        at_end = {trial.total_epochs: trial.metrics[stop.metric]} if stop.metric in trial.metrics else {}
        scores = {str(epoch): value for epoch, value in {**at_rungs, **at_end}.items() if epoch <= epochs}
    our_rung_0, their_rung_0 = (each.teacher if each else None for each in (stop, theirs))
    if our_rung_0 and their_rung_0 and our_rung_0.metric == their_rung_0.metric and same(our_rung_0.metric):
        teacher_score = trial.teacher_score
    if not scores and teacher_score is None:
        return None
    return {"state": "paused", "params": params, "scores": scores, "teacher_score": teacher_score, "epochs": epochs}


def _applicable_params(space: Space, params: Mapping[str, Any]) -> Params:
    """The parameters of another study's draw that can be drawn in this space, in branches that it has."""
    kept: Params = {}
    for parameter, conditions in space_tree.parameters_with_conditions(space.root):
        in_branch = all(kept.get(branch) == choice for branch, choice in conditions.items())
        if in_branch and parameter.name in params and space_tree.value_problem(parameter, params[parameter.name]) is None:
            kept[parameter.name] = params[parameter.name]
    return kept


def _same_evaluation_check(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Callable[[str], bool]:
    """A function: metric -> whether both pairs get it from the same evaluation on the same data, or from none, as for costs."""

    def evaluation_of(pair: Mapping[str, Any], metric: str) -> Any:
        name = metric.split("/")[0]
        found = [entry for entry in pair["evals"] if (entry.get("name") or entry["kind"]) == name]
        return (found, pair["data"]["target"]) if found else None

    return lambda metric: bool(evaluation_of(ours, metric) == evaluation_of(theirs, metric))


def _trial_from_result(result: Mapping[str, Any], number: int) -> Trial:
    return Trial(
        number,
        dict(result["params"]),
        {"student": {"schedule": {"epochs": result.get("epochs", 0)}}},  # all that is read of this pair
        result["state"],
        scores={int(epoch): float(score) for epoch, score in result.get("scores", {}).items()},
        objectives=result.get("objectives", {}),
        teacher_score=result.get("teacher_score"),
    )
