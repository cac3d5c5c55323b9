"""Rehearse a space on the real cluster: a few images through every stage of every branch, and what that says of the rest.

Everything is written to a store of its own inside the real one, so that it lies on the same disk, and removed at the end.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ktray.artifact import Artifact, Stage
from ktray.cost_model.forecast import Forecast, FullSizeStages, forecast
from ktray.errors import PreflightFailed, StageFailed, StoppedEarly
from ktray.runs.interruption import Interruption, hear_again, together
from ktray.runs.preflight import preflight
from ktray.scheduler.resources import DEFAULT_GPU_SHARE, GPU_STAGES, RuntimeSettings, gpu_share
from ktray.stores import Store, open_store
from ktray.stores.locks import lock_store_shared, try_lock_store

FOLDER = ".rehearsal-"
AT_ONCE = 8
SHOWN = 3
PEAKS = ("peak_bytes", "device_peak_bytes", "device_bytes")


class StageSource(Protocol):
    """Any scheduler."""

    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, Any]]:
        """Every stage published, in order."""

    def cancel(self, waiter: str) -> None:
        """End every `obtain` of this waiter at once."""


@dataclass(frozen=True)
class DryRunResult:
    """What a rehearsal found.

    Attributes:
        nodes: how many nodes of the cluster live.
        stages: as of `measured`, and `expected`, `whole_seconds` and `whole_bytes` as of a forecast.
        seconds: forecast of all stages at full size, one after the other.
        bytes: forecast of the disk that they take.
        pair_bytes: disk that the largest of the draws would take alone.
        free_bytes: disk that is free where the store is.
        notes: what to think about, in sentences.
    """

    nodes: int
    stages: dict[str, dict[str, Any]]
    seconds: float
    bytes: int
    pair_bytes: int
    free_bytes: int
    notes: list[str]


def dry_run_on(
    home: Path,
    store: Store,
    address: str | None,
    runtime: RuntimeSettings,
    draws: Mapping[str, list[Stage]],
    wanted: FullSizeStages,
    say: Callable[[str], None],
    stopping: Interruption,
) -> DryRunResult:
    """Start Ray, or connect to it, look at every node, and rehearse.

    Args:
        draws: name of a draw, such as ``teacher=rotation: transfer.k=500`` -> its stages in small.
        wanted: the same at full size, for a forecast of what that takes.

    Raises:
        PreflightFailed: one paragraph with everything that is wrong.
        UserError: the home is in use, or there is no such cluster.
        KeyboardInterrupt: `stopping` was wished; nothing of it runs or is left any more.
    """
    import ray

    from ktray.pipeline.execute import execute
    from ktray.scheduler import client
    from ktray.scheduler.ray_session import start, stop

    stopping.orderly = True
    session = start(home, address, runtime)
    hear_again()
    with ExitStack() as ending:
        ending.callback(hear_again)
        ending.callback(stop, session)
        for warning in session.warnings:
            say(warning)
        preflight(store, runtime)
        nodes = sum(node["Alive"] for node in ray.nodes())
        # The scheduler ends before its store goes: what then failed in there would make the folder again.
        with dry_run_store(store) as own, ending.pop_all():
            try:
                problems = dry_run(client.connect(session, own.url, execute), draws, own, store, stopping)
            except StoppedEarly as stop_early:
                problems = [f"{stop_early}."]
            stages, notes = measured(draws, own, runtime)
            coming = forecast(draws, wanted, own, store)
    free = shutil.disk_usage(store.root).free
    problems += _no_room(coming.pair_bytes, free)
    if problems:
        raise PreflightFailed(" ".join(problems))
    return _summed(nodes, stages, coming, free, notes)


def _no_room(pair: int, free: int) -> list[str]:
    return [f"One pair would take about {pair >> 20} MB of disk, and {free >> 20} MB are free."] if pair > free else []


def _summed(nodes: int, stages: dict[str, dict[str, Any]], coming: Forecast, free: int, notes: list[str]) -> DryRunResult:
    """All of it together; a disk that is too small for all draws is worth a note and no refusal, because that is rough."""
    if coming.bytes > free:
        needed = f"all of it would take roughly {coming.bytes / 2**30:.1f} GB of disk, and {free / 2**30:.1f} GB are free"
        notes = [*notes, f"{needed}; make room before, or it stops early and goes on once there is room"]
    for name, entry in stages.items():
        entry |= coming.stages.get(name, {"expected": 0.0, "whole_seconds": 0.0, "whole_bytes": 0})
    return DryRunResult(nodes, stages, coming.seconds, coming.bytes, coming.pair_bytes, free, notes)


@contextmanager
def dry_run_store(store: Store) -> Iterator[Store]:
    """A store inside `store`, for the time of a `with`; what a dead one left there is removed, too."""
    for left in store.root.glob(f"{FOLDER}*"):
        alone = try_lock_store(f"file://{left}")
        if alone is not None:  # else somebody rehearses there, or a worker that is about to end still does
            shutil.rmtree(left, ignore_errors=True)
            alone.release()
    folder = store.root / f"{FOLDER}{uuid.uuid4().hex[:8]}"
    held = lock_store_shared(f"file://{folder}")
    while not folder.exists():  # another rehearsal began in the very moment between the folder and its lock
        held = lock_store_shared(f"file://{folder}")
    try:
        yield open_store(f"file://{folder}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            held.release()


def dry_run(
    scheduler: StageSource, draws: Mapping[str, list[Stage]], store: Store, real: Store, stopping: Interruption | None = None
) -> list[str]:
    """Run the stages of each draw; one sentence per stage that failed.

    Args:
        draws: name of a draw, such as ``teacher=rotation: transfer.k=500`` -> its stages in small.
        store: where the scheduler of the rehearsal publishes.
        real: where artifacts lie that a loaded teacher names.

    Raises:
        KeyboardInterrupt: `stopping` was wished; no thread goes on.
        StoppedEarly: the disk is full, or the scheduler has ended.
    """
    _lend(draws, store, real)
    failed: dict[str, str] = {}

    def one(name: str) -> None:
        try:
            scheduler.obtain(draws[name], _waiter(name))
        except StageFailed as failure:
            failed.setdefault(f"{failure.stage.rpartition('-')[0]} fails: {failure.cause}", name)

    together(scheduler, draws, one, _waiter, AT_ONCE, stopping or Interruption())
    said = [f"With {name} the stage {what.rstrip('.')}." for what, name in failed.items()]
    return said[:SHOWN] + ([f"{len(said) - SHOWN} more stages fail."] if len(said) > SHOWN else [])


def _waiter(name: str) -> str:
    return f"rehearsal of {name}"


def _lend(draws: Mapping[str, list[Stage]], store: Store, real: Store) -> None:
    """Let the rehearsal read artifacts that no stage of it makes."""
    made = {stage.key for stages in draws.values() for stage in stages}
    for key in {key for stages in draws.values() for stage in stages for key in stage.inputs.values()} - made:
        found = real.find(key)
        if found is not None:
            (store.root / key).symlink_to(found.directory)


def measured(
    draws: Mapping[str, list[Stage]], store: Store, runtime: RuntimeSettings
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What stages took, by their names, and a word on needs that are too small.

    Of each stage: `runs`; `seconds` of the longest; `peak_bytes` of memory of its process and `device_peak_bytes` of its
    tensors on a GPU, of the largest; `device_bytes` that this GPU has; the last two are 0 where no stage had one.
    """
    found: dict[str, dict[str, Any]] = {}
    for artifact in _artifacts(draws, store):
        record = artifact.record
        entry = found.setdefault(record["stage"], {"runs": 0, "seconds": 0.0, **dict.fromkeys(PEAKS, 0)})
        entry["runs"] += 1
        if record["device_peak_bytes"] > entry["device_peak_bytes"]:
            entry["device_bytes"] = record["device_bytes"]
        for measure in ("seconds", "peak_bytes", "device_peak_bytes"):
            entry[measure] = max(entry[measure], record[measure])
    return found, [note for name, entry in sorted(found.items()) for note in _too_small(name, entry, runtime)]


def _too_small(name: str, entry: Mapping[str, Any], runtime: RuntimeSettings) -> Iterator[str]:
    needs = runtime.request_of(name)
    if 0 < needs.memory_bytes < entry["peak_bytes"]:
        wanted, given = entry["peak_bytes"] / 2**30, needs.memory_bytes / 2**30
        yield f"{name} used {wanted:.1f} GiB on a few images, and stages.{name}.memory_bytes reserves {given:.1f}"
    peak, whole = entry["device_peak_bytes"], entry["device_bytes"]
    if not peak or not whole:
        return
    used, right = f"{name} used {peak / 2**30:.1f} of the {whole / 2**30:.1f} GiB of its GPU", gpu_share(peak, whole)
    if needs.gpus is not None and 0 < needs.gpus < right:
        yield f"{used}, which takes a share of {right:g}, and stages.{name}.gpus gives it {needs.gpus:g}"
    elif needs.gpus is None and name in GPU_STAGES and right > DEFAULT_GPU_SHARE:
        yield f"{used}, and gets a share of {DEFAULT_GPU_SHARE:g} at first; set stages.{name}.gpus: {right:g}"


def _artifacts(draws: Mapping[str, list[Stage]], store: Store) -> Iterator[Artifact]:
    for key in sorted({stage.key for stages in draws.values() for stage in stages}):
        artifact = store.find(key)
        if artifact is not None:
            yield artifact
