"""How certain metrics are: standard errors over images, differences of pairs on the same images, and the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ktray import plugins
from ktray.artifact import Artifact
from ktray.errors import UserError
from ktray.fingerprint import fingerprint
from ktray.scoring import per_image
from ktray.scoring.per_image import Difference, PerImage, Recompute
from ktray.search.trial import Trial
from ktray.stores import Store, intact_file_or_none
from ktray.training.step_training import spread_of


def results_of(keys: Mapping[str, Any], evaluation: str, store: Store) -> tuple[PerImage, Recompute | None] | None:
    """The results per image of one evaluation of a pair, and how its metrics are computed anew; None if it has none.

    Args:
        keys: of the pair, with evaluation -> name -> key.
    """
    key = keys.get("evaluation", {}).get(evaluation)
    artifact = store.find(key) if key else None
    if artifact is None or per_image.FILE not in artifact.record["files"]:
        return None
    path = intact_file_or_none(artifact, per_image.FILE)
    return None if path is None else (_read(path), _recompute(artifact))


@lru_cache(maxsize=64)
def _read(path: Path) -> PerImage:
    return per_image.read(path)


def _recompute(artifact: Artifact) -> Recompute | None:
    try:
        kind = artifact.record["spec"]["kind"]
        if not plugins.defines("evaluation", kind, "recompute"):
            return None
        module = plugins.module("evaluation", kind)
    except UserError:  # a plugin that this command does not trust
        return None
    found: Recompute = module.recompute
    return found


def standard_errors(keys: Mapping[str, Any], store: Store) -> dict[str, float]:
    """Metric, such as ``knn/top1`` -> its standard error over images, of each evaluation with results per image."""
    found: dict[str, float] = {}
    for name in keys.get("evaluation", {}):
        results = results_of(keys, name, store)
        if results is not None:
            found |= {f"{name}/{metric}": error for metric, error in per_image.standard_errors(*results).items()}
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any], store: Store) -> dict[str, Difference]:
    """Metric -> the first pair minus the second, of each evaluation that has judged both on the same images.

    Args:
        one, other: keys of the pairs.
    """
    found: dict[str, Difference] = {}
    for name in one.get("evaluation", {}):
        ours, theirs = results_of(one, name, store), results_of(other, name, store)
        if ours is None or theirs is None or sorted(ours[0].names) != sorted(theirs[0].names):
            continue
        each = per_image.paired_differences(ours[0], theirs[0], ours[1])
        found |= {f"{name}/{metric}": difference for metric, difference in each.items()}
    return found


def level_with_best(trials: Sequence[Trial], metric: str, store: Store) -> set[int]:
    """Numbers of the trials that cannot be told apart from the first one in a metric, by the images that both were judged on.

    Args:
        trials: best first. Those without results per image are told apart as their values say.
    """
    if not trials:
        return set()
    best, name = trials[0], metric.split("/")[0]
    evaluation = next((each for each in best.keys.get("evaluation", {}) if metric.startswith(f"{each}/")), name)
    own = results_of(best.keys, evaluation, store)
    found = set()
    for trial in trials[1:] if own is not None else ():
        results = results_of(trial.keys, evaluation, store)
        if results is None or own is None or sorted(results[0].names) != sorted(own[0].names):
            continue
        difference = per_image.paired_differences(own[0], results[0], own[1]).get(metric.removeprefix(f"{evaluation}/"))
        if difference is not None and not difference.told_apart:
            found.add(trial.number)
    return found


@dataclass(frozen=True)
class OverSeeds:
    """One pair under several seeds.

    Attributes:
        trials: numbers of its trials.
        mean, deviation: of the metric; the deviation is that of a sample.
        low, high: the 95 % interval of the mean, by Student's t.
    """

    trials: tuple[int, ...]
    mean: float
    deviation: float
    low: float
    high: float


def over_seeds(trials: Sequence[Trial], metric: str) -> list[OverSeeds]:
    """The pairs that completed under at least two seeds, in the order of their first trials."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        value = trial.objectives.get(metric, trial.metrics.get(metric))
        if trial.state == "completed" and value is not None and math.isfinite(value):
            groups.setdefault(fingerprint(_without_seeds(trial.pair)), []).append(trial)
    return [_spread(group, metric) for group in groups.values() if len(group) > 1]


def _without_seeds(pair: Any) -> Any:
    """A pair without the seeds of teacher, transfer and student; that of the data's split says which images there are."""
    if isinstance(pair, Mapping):
        return {name: value if name == "data" else _without_seeds(value) for name, value in pair.items() if name != "seed"}
    return [_without_seeds(each) for each in pair] if isinstance(pair, list | tuple) else pair


def _spread(group: Sequence[Trial], metric: str) -> OverSeeds:
    found = spread_of([float(trial.objectives.get(metric, trial.metrics.get(metric, math.nan))) for trial in group])
    return OverSeeds(tuple(trial.number for trial in group), found.mean, found.deviation, found.low, found.high)
