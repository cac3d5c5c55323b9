"""Find or compute one artifact. The same function runs in the local process and on every worker of the scheduler."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ktray import progress
from ktray.artifact import Artifact, Stage
from ktray.errors import MissingInput
from ktray.pipeline import peak_memory
from ktray.pipeline.record import record_of
from ktray.pool import StageContext
from ktray.stages import FAMILY_WORK, WORK
from ktray.stores import Store
from ktray.training import snapshot


def execute(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
    """The artifact of `stage`, and whether this call published it; the stages beside it are published, too.

    Args:
        attempt: name of this attempt, unique per key.

    Raises:
        MissingInput: an artifact that the stage reads is absent.
        FileNotFoundError: this attempt was fenced.
        Exception: whatever the stage raises.
    """
    wanted = [each for each in (stage, *stage.computed_with) if store.find(each.key) is None]
    published: dict[str, tuple[Artifact, bool]] = {}
    if wanted:
        inputs = {role: _input(store, key) for role, key in stage.inputs.items()}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more threads change sums in the last bit, and one actor owns one core
        try:
            peak_memory.reset_peaks(context.device)
            with progress.heard(context.progress) as tell:
                heard = replace(context, progress=tell)
                if len(wanted) > 1:
                    published = _compute_family(wanted, inputs, store, attempt, heard)
                else:
                    published = {wanted[0].key: _compute(wanted[0], inputs, store, attempt, heard)}
        finally:
            torch.set_num_threads(threads)  # in a notebook, what runs after this is not ours
            peak_memory.give_back(context.device)
    if stage.key not in published:
        return _input(store, stage.key), False
    return published[stage.key]


def _compute(
    stage: Stage, inputs: Mapping[str, Artifact], store: Store, attempt: str, context: StageContext
) -> tuple[Artifact, bool]:
    scratch = store.scratch(stage.key, attempt)
    start = _latest_snapshot(stage, store)
    began = time.perf_counter()
    metrics = WORK[stage.name](stage, inputs, scratch, context, start)
    seconds = time.perf_counter() - began
    record = record_of(stage, metrics, seconds, inputs, context)
    record |= {"attempt": attempt, "started_from": start.name if start else None}
    record |= stage.about
    record["seconds_alone"] = round(_seconds_alone(stage, store, seconds, start), 3)
    return store.publish(scratch, stage.key, record)


def _compute_family(
    stages: list[Stage], inputs: Mapping[str, Artifact], store: Store, attempt: str, context: StageContext
) -> dict[str, tuple[Artifact, bool]]:
    """One run for several stages. Each is charged its share of the seconds, so that they sum to what was spent.

    A share is in proportion to what the stage would have cost alone; the dearest of them would have cost the whole run.
    """
    scratches = [store.scratch(stage.key, attempt) for stage in stages]
    began = time.perf_counter()
    made = FAMILY_WORK[stages[0].name](stages, inputs, scratches, context)
    seconds = time.perf_counter() - began
    work = [alone for _, alone in made]
    together = sorted(stage.key for stage in stages)
    published = {}
    for stage, scratch, (metrics, alone) in zip(stages, scratches, made, strict=True):
        record = record_of(stage, metrics, seconds * alone / sum(work), inputs, context)
        record |= {"attempt": attempt, "started_from": None, "together": together}
        record["seconds_alone"] = round(seconds * alone / max(work), 3)
        published[stage.key] = store.publish(scratch, stage.key, record)
    return published


def _input(store: Store, key: str) -> Artifact:
    found = store.find(key)
    if found is None:
        raise MissingInput(key)
    return found


def _latest_snapshot(stage: Stage, store: Store) -> Path | None:
    """The furthest snapshot to start from: a checkpoint of a dead attempt at this key, or an earlier epoch's artifact."""
    artifacts = (artifact.directory for artifact in map(store.find, stage.starts) if artifact)
    found = [_first_readable(store.checkpoints(stage.key)), _first_readable(artifacts)]
    return max(filter(None, found), default=(0, None))[1]


def _first_readable(newest_first: Iterable[Path]) -> tuple[int, Path] | None:
    """The first snapshot that is whole, and its epoch: a torn one costs epochs, and must not fail its stage for ever."""
    for directory in newest_first:
        try:
            return snapshot.epoch_of(directory), directory
        except ValueError as error:
            warnings.warn(f"{error}; going on without it", stacklevel=2)
    return None


def _seconds_alone(stage: Stage, store: Store, seconds: float, start: Path | None) -> float:
    """What this stage would have cost without the snapshot that it continued."""
    if start is None:
        return seconds
    earlier = store.find(start.name)
    if earlier:
        return seconds + float(earlier.record["seconds_alone"])
    until, begun = stage.spec["epoch"], snapshot.epoch_of(start)  # a dead attempt's checkpoint: its epochs cost what ours did
    return float(seconds * until / max(1, until - begun))
