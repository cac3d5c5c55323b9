"""Finds or computes one artifact. The same function runs in the local process and on every worker of the scheduler."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ktray import checkpoints, conditions, progress
from ktray.artifact import Artifact, Stage
from ktray.checksums import version_of
from ktray.errors import DamagedArtifact, MissingInput
from ktray.pipeline.record import record_of, reset_peaks
from ktray.pool import StageContext, release_gpu_memory
from ktray.stages import Run, family_work_of, work_of
from ktray.stores import Store

_COUNTED_IN_STEPS = ("clusters", "evaluation")  # their checkpoints are those of `checkpoints.saving`, not of a training


def execute(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
    """The artifact of `stage`, and whether this call published it. Those in its `computed_with` are published, too.

    Args:
        attempt: name of this attempt, unique per key.

    Raises:
        MissingInput: an artifact that the stage reads is absent, or was found damaged and moved aside.
        FileNotFoundError: this attempt was fenced.
        Exception: whatever the stage raises.
    """
    missing = [each for each in (stage, *stage.computed_with) if store.find(each.key) is None]
    published: dict[str, tuple[Artifact, bool]] = {}
    if missing:
        inputs = {role: _find_input(store, key) for role, key in stage.inputs.items()}
        work = work_of(stage.name)  # imports torch, unless the stage only decodes images
        try:
            with _one_thread(), progress.reporting(context.progress) as report, _intact_inputs(stage, store):
                reset_peaks(context.device)
                context = replace(context, progress=report)
                if len(missing) > 1:
                    published = _compute_family(missing, inputs, store, attempt, context)
                else:
                    published = {missing[0].key: _compute(missing[0], work, inputs, store, attempt, context)}
        finally:
            release_gpu_memory()
    if stage.key not in published:
        return _find_input(store, stage.key), False
    return published[stage.key]


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch with one thread: more change sums in the last bit, and one actor owns one core.

    Where a stage decodes images while another thread still imports torch, the environment of a worker says the same.
    """
    torch = sys.modules.get("torch")
    if not hasattr(torch, "set_num_threads"):
        yield
        return
    assert torch is not None, "it has attributes"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)  # a notebook goes on with the user's own code


@contextmanager
def _intact_inputs(stage: Stage, store: Store) -> Iterator[None]:
    """Raise MissingInput if the stage meets a damaged artifact, or fails because another process has moved one that it reads.

    A stage that has failed for any other reason finds its inputs as they were when it began.
    """
    read = (*stage.inputs.values(), *stage.resume_from)
    versions = {key: version_of(store.root / key) for key in read}
    try:
        yield
    except DamagedArtifact as damage:
        store.set_aside(damage)
        raise MissingInput(_what_runs_again(stage, damage.directory.name), damage.problem) from damage
    except Exception as error:
        for key, version in versions.items():
            if version and version_of(store.root / key) != version:
                raise MissingInput(_what_runs_again(stage, key), "it was moved while it was read") from error
        raise


def _what_runs_again(stage: Stage, damaged: str) -> str:
    """Key of a damaged input; of the stage itself where a snapshot was damaged, without which it can do."""
    return damaged if damaged in stage.inputs.values() else stage.key


def _compute(
    stage: Stage, work: Run, inputs: Mapping[str, Artifact], store: Store, attempt: str, context: StageContext
) -> tuple[Artifact, bool]:
    scratch = store.scratch(stage.key, attempt)
    start = _latest_snapshot(stage, store)
    began = time.perf_counter()
    with conditions.collecting() as noted:
        metrics = work(stage, inputs, scratch, context, start)
    seconds = time.perf_counter() - began
    record = record_of(stage, metrics, seconds, inputs, context)
    record |= {"attempt": attempt, "started_from": start.name if start else None, "conditions": noted}
    record |= stage.about
    kept = (conditions.KEPT_ROWS, conditions.KEPT_PROJECTION)
    saved = sum(noted.get(name, {}).get("seconds", 0.0) for name in kept)
    record["seconds_alone"] = round(_seconds_alone(stage, store, seconds, start) + saved, 3)
    return store.publish(scratch, stage.key, record)


def _compute_family(
    stages: list[Stage], inputs: Mapping[str, Artifact], store: Store, attempt: str, context: StageContext
) -> dict[str, tuple[Artifact, bool]]:
    """One run for several stages. Each record gets a share of the seconds, and the shares sum to the duration of the run.

    A share is proportional to what the stage would have cost alone. The most expensive one alone would have cost the whole run.
    """
    scratches = [store.scratch(stage.key, attempt) for stage in stages]
    began = time.perf_counter()
    with conditions.collecting() as noted:
        made = family_work_of(stages[0].name)(stages, inputs, scratches, context)
    seconds = time.perf_counter() - began
    costs = [cost for _, cost in made]
    together = sorted(stage.key for stage in stages)
    published = {}
    for stage, scratch, (metrics, cost) in zip(stages, scratches, made, strict=True):
        record = record_of(stage, metrics, seconds * cost / sum(costs), inputs, context)
        record |= {"attempt": attempt, "started_from": None, "conditions": noted, "together": together}
        record["seconds_alone"] = round(seconds * cost / max(costs), 3)
        published[stage.key] = store.publish(scratch, stage.key, record)
    return published


def _find_input(store: Store, key: str) -> Artifact:
    found = store.find(key)
    if found is None:
        raise MissingInput(key)
    return found


def _latest_snapshot(stage: Stage, store: Store) -> Path | None:
    """The latest snapshot to resume from: a checkpoint of a dead attempt at this key, or an earlier epoch's artifact."""
    if stage.name in _COUNTED_IN_STEPS:
        found = [_first_readable(store.checkpoints(stage.key), store, checkpoints.step_of)]
    else:
        artifacts = (artifact.directory for artifact in map(store.find, stage.resume_from) if artifact)
        found = [_first_readable(each, store, _epoch_of) for each in (store.checkpoints(stage.key), artifacts)]
    return max(filter(None, found), default=(0, None))[1]


def _epoch_of(directory: Path) -> int:
    from ktray.training import snapshot  # torch, which a stage without snapshots need not wait for

    return snapshot.epoch_of(directory)


def _first_readable(newest_first: Iterable[Path], store: Store, number_of: Callable[[Path], int]) -> tuple[int, Path] | None:
    """Epoch (or step) and directory of the first snapshot that can be read. A damaged one costs work, but fails no stage."""
    for directory in newest_first:
        try:
            if not version_of(directory):
                raise ValueError(f"the snapshot {directory} was made by an earlier version of ktray and has no checksums")
            return number_of(directory), directory
        except DamagedArtifact as damage:
            store.set_aside(damage)
        except (ValueError, FileNotFoundError) as error:
            store.on_damage(f"{error}; the work goes on without it")
    return None


def _seconds_alone(stage: Stage, store: Store, seconds: float, start: Path | None) -> float:
    """The seconds that this stage would have taken without the snapshot that it resumed from."""
    if start is None:
        return seconds
    if stage.name in _COUNTED_IN_STEPS:
        return seconds + checkpoints.seconds_of(start)
    earlier = store.find(start.name)
    if earlier:
        return seconds + float(earlier.record["seconds_alone"])
    # A dead attempt's checkpoint: assume that its epochs took as long as these.
    until, resumed_at = stage.spec["epoch"], _epoch_of(start)
    return float(seconds * until / max(1, until - resumed_at))
