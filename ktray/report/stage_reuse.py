"""What sharing artifacts saved: each was computed once, and many trials used it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ktray.artifact import Artifact, kind_of
from ktray.report.formatting import duration
from ktray.search.trial import keys_in
from ktray.stores import Store
from ktray.text import counted

if TYPE_CHECKING:
    from ktray.search.trial import Trial

STAGE_ORDER = ("images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation")
FindArtifact = Callable[[str], Artifact | None]


def stage_position(stage: str) -> int:
    """Return the place of a stage kind in the pipeline; unknown kinds come last."""
    return STAGE_ORDER.index(stage) if stage in STAGE_ORDER else len(STAGE_ORDER)


def cached_find(store: Store) -> FindArtifact:
    """Return `store.find` with a cache: each call checks every file of an artifact."""
    return lru_cache(maxsize=None)(store.find)


def with_inputs(keys: Iterable[str], find: FindArtifact) -> dict[str, Artifact]:
    """Return key -> artifact for `keys` and their direct and indirect inputs, without those that are missing from the store."""
    found: dict[str, Artifact] = {}
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        artifact = None if key in found else find(key)
        if artifact is not None:
            found[key] = artifact
            waiting += artifact.record.get("inputs", {}).values()
    return found


def reuse_table(trials: Sequence[Trial], find: FindArtifact) -> dict[str, Any] | None:
    """Per stage kind and in total: artifacts computed, how often trials used them, seconds spent, and seconds without sharing.

    Seconds without sharing count a training that continued an earlier snapshot at its full length. Seconds spent count each
    snapshot once. Duplicates and trials without artifacts are left out; None if no trial remains.
    """
    computed: dict[str, Artifact] = {}
    uses: dict[str, list[float]] = {}  # stage kind -> seconds alone, per use by a trial
    used = [with_inputs(keys_in(trial.keys), find) for trial in trials if trial.state != "duplicate"]
    for artifacts in used:
        computed |= artifacts
        for key, artifact in artifacts.items():
            uses.setdefault(kind_of(key), []).append(_seconds_alone(artifact))
    if not computed:
        return None
    spent: dict[str, float] = {}
    for key, artifact in _with_snapshots(computed, find).items():
        spent[kind_of(key)] = spent.get(kind_of(key), 0.0) + float(artifact.record["seconds"])
    rows = [
        _row(kind, sum(kind_of(key) == kind for key in computed), len(uses[kind]), spent[kind], sum(uses[kind]))
        for kind in sorted(uses, key=stage_position)
    ]
    all_spent, all_alone = sum(spent.values()), sum(map(sum, uses.values()))
    rows.append(_row("all stages", len(computed), sum(map(len, used)), all_spent, all_alone))
    saved = f"Sharing saved {duration(all_alone - all_spent)} of {duration(all_alone)}" if all_alone > all_spent else ""
    return {"rows": rows, "saved": saved, "trials": counted(sum(map(bool, used)), "trial")}


def _row(name: str, artifacts: int, uses: int, spent: float, alone: float) -> dict[str, Any]:
    ratio = f"{alone / spent:.1f} ×" if spent > 0 else "–"
    return {"name": name, "cells": [f"{artifacts:,}", f"{uses:,}", duration(spent), duration(alone), ratio]}


def _with_snapshots(artifacts: Mapping[str, Artifact], find: FindArtifact) -> dict[str, Artifact]:
    """Return `artifacts` and the earlier snapshots that their trainings continued."""
    found = dict(artifacts)
    waiting = list(artifacts.values())
    while waiting:
        earlier = waiting.pop().record.get("started_from")
        artifact = find(earlier) if earlier and earlier not in found and not earlier.startswith("checkpoint-") else None
        if artifact is not None:
            found[artifact.key] = artifact
            waiting.append(artifact)
    return found


def _seconds_alone(artifact: Artifact) -> float:
    return float(artifact.record.get("seconds_alone", artifact.record["seconds"]))
