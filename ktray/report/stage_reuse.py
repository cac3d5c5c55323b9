"""What sharing stages saved: each artifact was made once, and many trials asked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ktray.artifact import Artifact
from ktray.report.formatting import counted, duration
from ktray.stores import Store

if TYPE_CHECKING:
    from ktray.search.trial import Trial

ORDER = ("images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation")
Find = Callable[[str], Artifact | None]


def finder(store: Store) -> Find:
    """`store.find`, which looks at every file of an artifact, asked once per key."""
    return lru_cache(maxsize=None)(store.find)


def keys_of(trial: Trial) -> list[str]:
    """The keys that a trial names, evaluations included."""
    found: list[str] = []
    for value in trial.keys.values():
        found += value.values() if isinstance(value, Mapping) else [value]
    return found


def needed(keys: Iterable[str], find: Find) -> dict[str, Artifact]:
    """Key -> artifact of `keys` and all that they read, however deep; what the store lost is absent."""
    found: dict[str, Artifact] = {}
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        artifact = None if key in found else find(key)
        if artifact is not None:
            found[key] = artifact
            waiting += artifact.record.get("inputs", {}).values()
    return found


def reuse(trials: Sequence[Trial], find: Find) -> dict[str, Any] | None:
    """Per stage kind, and in total: artifacts made, how often trials asked for them, and seconds spent and asked for.

    A training that went on from an earlier snapshot counts as asked for with its whole length, and as made with its own seconds
    and those of each snapshot before it, once. Duplicates and trials that name no artifact are left out; None if all are.
    """
    made: dict[str, Artifact] = {}
    asked: dict[str, list[float]] = {}
    demands = [needed(keys_of(trial), find) for trial in trials if trial.state != "duplicate"]
    for demand in demands:
        made |= demand
        for key, artifact in demand.items():
            asked.setdefault(_stage(key), []).append(_seconds_alone(artifact))
    if not made:
        return None
    spent: dict[str, float] = {}
    for key, artifact in _with_snapshots(made, find).items():
        spent[_stage(key)] = spent.get(_stage(key), 0.0) + float(artifact.record["seconds"])
    kinds = sorted(asked, key=lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))
    rows = [
        _row(kind, sum(_stage(key) == kind for key in made), len(asked[kind]), spent[kind], sum(asked[kind])) for kind in kinds
    ]
    rows.append(_row("all stages", len(made), sum(map(len, demands)), sum(spent.values()), sum(map(sum, asked.values()))))
    return {"rows": rows, "trials": counted(sum(map(bool, demands)), "trial")}


def _row(name: str, artifacts: int, demands: int, spent: float, alone: float) -> dict[str, Any]:
    ratio = f"{alone / spent:.1f} ×" if spent > 0 else "–"
    return {"name": name, "cells": [f"{artifacts:,}", f"{demands:,}", duration(spent), duration(alone), ratio]}


def _with_snapshots(made: Mapping[str, Artifact], find: Find) -> dict[str, Artifact]:
    """`made` and the earlier snapshots that its trainings went on from."""
    found = dict(made)
    waiting = list(made.values())
    while waiting:
        earlier = waiting.pop().record.get("started_from")
        artifact = find(earlier) if earlier and earlier not in found and not earlier.startswith("checkpoint-") else None
        if artifact is not None:
            found[artifact.key] = artifact
            waiting.append(artifact)
    return found


def _seconds_alone(artifact: Artifact) -> float:
    return float(artifact.record.get("seconds_alone", artifact.record["seconds"]))


def _stage(key: str) -> str:
    return key.rsplit("-", 1)[0]
