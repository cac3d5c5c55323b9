"""A small search space as plain data, and a driver that runs a study without computing anything."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ktray.search import space
from ktray.search.observations import Observations
from ktray.search.space import Space
from ktray.search.study import Assignment, Study
from ktray.search.trial import Trial
from tests.toys import DATA

PAIR: dict[str, Any] = {
    "data": DATA,
    "teacher": {
        "one_of": {
            "hog": {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7]}}},
            "rotation": {
                "pretext": {"kind": "rotation"},
                "backbone": {"kind": "alexnet", "width": 0.125},
                "layer": {"choice": ["conv3", "conv4", "conv5"]},
                "schedule": {"epochs": {"choice": [2, 4]}},
            },
        }
    },
    "transfer": {"kind": "clusters", "k": {"choice": [5, 10, 20]}},
    "student": {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 9, "lr": {"log_float": [0.01, 0.1]}}},
    "evals": [{"kind": "knn"}, {"kind": "linear_probe"}],
}
FINITE = {"student": {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 9}}}


def content(pair: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A space's file as plain data; `pair` and `fields` replace top-level entries of the pair and of the file."""
    found: dict[str, Any] = {
        "study": "toy",
        "objectives": [{"metric": "linear_probe/top1", "mode": "max"}],
        "budget": {"trials": 6, "concurrent": 2},
        "early_stop": {"metric": "knn/top1", "rungs": [1, 3, 9], "reduction": 3},
        "pair": {**PAIR, **(pair or {})},
        **fields,
    }
    return copy.deepcopy({name: value for name, value in found.items() if value is not None})


def write(folder: Path, pair: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Writes `content` to a file."""
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(content(pair, **fields), sort_keys=False))
    return path


def toy_space(folder: Path, pair: dict[str, Any] | None = None, **fields: Any) -> Space:
    return space.load(write(folder, pair, **fields), [])


def score(trial: Trial, epoch: int = 9) -> float:
    """Deterministic: rotation is better than HOG, a larger k is better, and training helps a little."""
    return (0.5 if trial.params["teacher"] == "rotation" else 0.2) + trial.params["transfer.k"] / 100 + epoch / 1000


def end_segment(study: Study, assignment: Assignment, judge: Callable[[Trial, int], float] = score) -> Trial:
    """Ends a segment as if it had been computed."""
    value = judge(assignment.trial, assignment.until)
    if not assignment.final:
        return study.pause_at_rung(assignment.trial.number, assignment.until, value)
    metrics = {"linear_probe/top1": value, "knn/top1": value, "cost/seconds": 10.0}
    return study.finish(
        assignment.trial.number, metrics, metrics, {"student": "student-1"}, {"seconds": 10.0, "marginal_seconds": 1.0}
    )


def drive(study: Study, judge: Callable[[Trial, int], float] = score, segments: int = 10_000) -> list[Assignment]:
    """Runs a study, the oldest segment first, until it is done or this many segments have ended."""
    assignments: list[Assignment] = []
    running: list[Assignment] = []
    while segments:
        answer = study.next()
        if answer == "done":
            break
        if isinstance(answer, Assignment):
            assignments.append(answer)
            running.append(answer)
        else:
            end_segment(study, running.pop(0), judge)
            segments -= 1
    return assignments


def states(study: Study) -> Counter[str]:
    return Counter(trial.state for trial in study.trials())


def next_assignment(study: Study) -> Assignment:
    answer = study.next()
    assert isinstance(answer, Assignment)
    return answer


def ranked_numbers(observations: Observations) -> list[int]:
    """Numbers of all observed trials: those with a result, best first, then the pending ones."""
    return [trial.number for part in observations.ranked_and_pending(1_000) for trial in part]
