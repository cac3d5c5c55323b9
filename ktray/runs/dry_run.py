"""Dry run of a space on the real cluster: a few images through every stage of every branch, and a forecast for the rest.

Everything is written to a temporary store inside the real one, so that it is on the same disk, and removed at the end. Its
stages have keys that no real stage can have.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ktray.artifact import Artifact, Stage
from ktray.cost_model.dry_run_forecast import Forecast, FullSizeStages, forecast
from ktray.errors import PreflightFailed, SearchStopped, StageFailed
from ktray.pipeline import pair_graph
from ktray.pipeline.pair_graph import Identity
from ktray.runs.interruption import Interruption, restore_signal_handlers, run_concurrently, run_until_ended
from ktray.runs.preflight import alive_nodes, preflight
from ktray.scheduler.resources import DEFAULT_GPU_SHARE, GPU_STAGES, RuntimeSettings, smallest_sufficient_share
from ktray.spec import PairSpec, teachers_of
from ktray.stages.images_stage import DRY_RUN
from ktray.stores import Store, open_store
from ktray.stores.locks import lock_store_shared, try_lock_store
from ktray.text import counted

MIN_IMAGES = 256  # enough to fit a descriptor, and for several images of each class in most data sets


def sample_size(pair: PairSpec) -> int:
    """Number of images of each split in a dry run: at least one batch of every training, and enough for its PCA."""
    sizes = [MIN_IMAGES]
    for generation in pair_graph.generations(pair):
        sizes += [generation.student.schedule.batch_size, 2 * (getattr(generation.transfer, "pca", None) or 0)]
        schedules = [getattr(teacher, "schedule", None) for teacher in teachers_of(generation)]
        sizes += [schedule.batch_size for schedule in schedules if schedule]
    return max(sizes)


_FEWEST = {"steps": 2, "min_steps": 2, "epochs": 1, "seeds": 1}
"""Fields of evaluations that train -> their values in a dry run."""


def small_pair(pair: PairSpec, count: int) -> PairSpec:
    """The same networks and methods, with one epoch or two steps of each training and at most `count` / 4 clusters.

    Args:
        count: number of images.
    """
    return PairSpec.model_validate(_shrunk(pair.model_dump(mode="json"), max(2, count // 4)))


def _shrunk(plain: dict[str, Any], limit: int) -> dict[str, Any]:
    """The plain data of a pair, and of the pair whose student teaches it, with at most `limit` clusters or anchors."""
    teachers = (plain["teacher"] or {}).get("several") or [plain["teacher"] or {}]
    for part in (*teachers, plain["student"]):
        if part.get("schedule"):
            part["schedule"] |= {"epochs": 1, "warmup": 0.0}
        if "pair" in part:
            part["pair"] = _shrunk(part["pair"], limit)
    plain["evals"] = [{**spec, **{name: n for name, n in _FEWEST.items() if name in spec}} for spec in plain["evals"]]
    transfer = plain["transfer"]
    if isinstance(transfer.get("k"), list):
        transfer["k"] = _distinct(transfer["k"], limit)
    limits = {"k": limit, "anchors": limit, "whole": limit, "min_size": 2}
    for field in limits.keys() & transfer.keys():
        if isinstance(transfer[field], int):
            transfer[field] = min(transfer[field], limits[field])
    if "neighbours" in transfer:
        transfer["neighbours"] = min(transfer["neighbours"], transfer["k"])
    return plain


def _distinct(numbers: list[int], limit: int) -> list[int]:
    """The numbers, reduced to at most `limit` and kept distinct, because each has a head of its own."""
    found: list[int] = []
    for number in numbers:
        found.append(next(smaller for smaller in range(min(number, limit), 1, -1) if smaller not in found))
    return found


def dry_run_stages(pair: PairSpec, identity: Identity) -> list[Stage]:
    """The stages of a pair's dry run, each after its inputs. `DRY_RUN` in every spec keeps their keys apart from real ones."""
    count = sample_size(pair)
    key_in_dry_run: dict[str, str] = {}
    stages = []
    for stage in pair_graph.build(small_pair(pair, count), identity).stages:
        inputs = {role: key_in_dry_run.get(key, key) for role, key in stage.inputs.items()}
        small = replace(stage, spec={**stage.spec, DRY_RUN: count}, inputs=inputs, resume_from=(), varying_fields=())
        key_in_dry_run[stage.key] = small.key
        stages.append(small)
    return stages


FOLDER = ".dry-run-"
CONCURRENT = 8
MAX_SHOWN = 3  # failures
PEAKS = ("peak_bytes", "device_peak_bytes", "device_bytes")


class _ObtainsStages(Protocol):
    """Any scheduler."""

    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, Any]]:
        """Every stage published, in order."""

    def cancel_requests(self, waiter: str) -> None:
        """End every `obtain` of this waiter at once."""


@dataclass(frozen=True)
class _DryRunResult:
    """What a dry run found.

    Attributes:
        nodes: how many nodes of the cluster live.
        stages: as `measured` returns them, with `expected`, `whole_seconds` and `whole_bytes` of the forecast.
        seconds: forecast of all stages at full size, one after the other.
        bytes: forecast of the disk space that they take.
        pair_bytes: disk space that the largest of the draws would take alone.
        free_bytes: free disk space where the store is.
        notes: sentences about what may have to be changed.
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
    full_size: FullSizeStages,
    inform: Callable[[str], None],
    interruption: Interruption,
) -> _DryRunResult:
    """Start Ray, or connect to it, check every node, and run the draws in small.

    Args:
        draws: name of a draw, such as ``teacher=rotation: transfer.k=500`` -> its stages in small.
        full_size: the same at full size, for the forecast.

    Raises:
        PreflightFailed: one paragraph with everything that is wrong.
        UserError: the home is in use, or there is no such cluster.
        KeyboardInterrupt: a stop was requested; nothing runs or is left any more.
    """
    from ktray.pipeline.execute import execute
    from ktray.scheduler import client
    from ktray.scheduler.ray_session import start, stop

    interruption.needs_cleanup = True
    session = start(home, address, runtime, interruption.lose, interruption.ends_process)
    restore_signal_handlers()
    with ExitStack() as ending:
        ending.callback(restore_signal_handlers)
        ending.callback(stop, session)
        for warning in session.warnings:
            inform(warning)
        nodes = run_until_ended(lambda: _check_nodes(store, runtime), interruption)
        # The scheduler must end before its store is removed: a stage that failed later would create the folder again.
        with dry_run_store(store) as small, ending.pop_all():
            try:
                scheduler = run_until_ended(lambda: client.connect(session, small.url, execute), interruption)
                problems = dry_run(scheduler, draws, small, store, interruption)
            except SearchStopped as stop_early:
                if interruption.loss is not None:
                    raise
                problems = [f"{stop_early}."]
            stages, notes = measured(draws, small, runtime)
            expected = forecast(draws, full_size, small, store)
    free = shutil.disk_usage(store.root).free
    problems += _disk_problems(expected.pair_bytes, free)
    if problems:
        raise PreflightFailed(" ".join(problems))
    return _result(nodes, stages, expected, free, notes)


def _check_nodes(store: Store, runtime: RuntimeSettings) -> int:
    """The number of nodes, all of which can run stages on this store."""
    preflight(store, runtime)
    return len(alive_nodes())


def _disk_problems(pair_bytes: int, free: int) -> list[str]:
    return (
        [f"One pair would take about {pair_bytes >> 20} MB of disk, and {free >> 20} MB are free."] if pair_bytes > free else []
    )


def _result(nodes: int, stages: dict[str, dict[str, Any]], expected: Forecast, free: int, notes: list[str]) -> _DryRunResult:
    """Everything together. A disk too small for all draws is only noted, not refused, because that forecast is rough."""
    if expected.bytes > free:
        needed = f"all of it would take roughly {expected.bytes / 2**30:.1f} GB of disk, and {free / 2**30:.1f} GB are free"
        notes = [*notes, f"{needed}; make room before, or it stops early and goes on once there is room"]
    for name, entry in stages.items():
        entry |= expected.stages.get(name, {"expected": 0.0, "whole_seconds": 0.0, "whole_bytes": 0})
    return _DryRunResult(nodes, stages, expected.seconds, expected.bytes, expected.pair_bytes, free, notes)


@contextmanager
def dry_run_store(store: Store) -> Iterator[Store]:
    """A temporary store inside `store`; what earlier dry runs that were killed have left there is removed as well."""
    for old in store.root.glob(f"{FOLDER}*"):
        lock = try_lock_store(f"file://{old}")
        if lock is not None:  # else another dry run uses it, or a worker that is about to end
            shutil.rmtree(old, ignore_errors=True)
            lock.release()
    folder = store.root / f"{FOLDER}{uuid.uuid4().hex[:8]}"
    held = lock_store_shared(f"file://{folder}")
    while not folder.exists():  # another dry run, starting between the two calls, took it for an old one
        held = lock_store_shared(f"file://{folder}")
    try:
        yield open_store(f"file://{folder}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            held.release()


def dry_run(
    scheduler: _ObtainsStages,
    draws: Mapping[str, list[Stage]],
    store: Store,
    real: Store,
    interruption: Interruption | None = None,
) -> list[str]:
    """Run the stages of each draw; one sentence per stage that failed.

    Args:
        draws: name of a draw, such as ``teacher=rotation: transfer.k=500`` -> its stages in small.
        store: where this scheduler publishes.
        real: has the artifacts that loaded teachers name.

    Raises:
        KeyboardInterrupt: a stop was requested; no thread goes on.
        SearchStopped: the disk is full, or the scheduler has ended.
    """
    _link_loaded(draws, store, real)
    failed: dict[str, str] = {}

    def run_draw(name: str) -> None:
        try:
            scheduler.obtain(draws[name], _waiter(name))
        except StageFailed as failure:
            failed.setdefault(f"{failure.stage.rpartition('-')[0]} fails: {failure.cause}", name)

    run_concurrently(scheduler, draws, run_draw, _waiter, CONCURRENT, interruption or Interruption())
    problems = [f"With {name} the stage {what.rstrip('.')}." for what, name in failed.items()]
    more = len(problems) - MAX_SHOWN
    return problems[:MAX_SHOWN] + ([f"{counted(more, 'more stage fails', 'more stages fail')}."] if more > 0 else [])


def _waiter(name: str) -> str:
    return f"dry run of {name}"


def _link_loaded(draws: Mapping[str, list[Stage]], store: Store, real: Store) -> None:
    """Make artifacts of the real store readable that no stage of the dry run makes."""
    made = {stage.key for stages in draws.values() for stage in stages}
    for key in {key for stages in draws.values() for stage in stages for key in stage.inputs.values()} - made:
        found = real.find(key)
        if found is not None:
            (store.root / key).symlink_to(found.directory)


def measured(
    draws: Mapping[str, list[Stage]], store: Store, runtime: RuntimeSettings
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What stages took, by their names, and notes on resource requests that are too small.

    Of each stage: `runs`, and the largest `seconds`, `peak_bytes` of its process's memory and `device_peak_bytes` of its
    tensors on a GPU; `device_bytes` is the memory of that GPU. The last two are 0 where no stage had a GPU.
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
    return found, [note for name, entry in sorted(found.items()) for note in _request_notes(name, entry, runtime)]


def _request_notes(name: str, entry: Mapping[str, Any], runtime: RuntimeSettings) -> Iterator[str]:
    request = runtime.resources_for(name)
    if 0 < request.memory_bytes < entry["peak_bytes"]:
        peak_memory, reserved = entry["peak_bytes"] / 2**30, request.memory_bytes / 2**30
        yield f"{name} used {peak_memory:.1f} GiB on a few images, and stages.{name}.memory_bytes reserves {reserved:.1f}"
    peak, total = entry["device_peak_bytes"], entry["device_bytes"]
    if not peak or not total:
        return
    used, right = (
        f"{name} used {peak / 2**30:.1f} of the {total / 2**30:.1f} GiB of its GPU",
        smallest_sufficient_share(peak, total),
    )
    if request.gpus is not None and 0 < request.gpus < right:
        yield f"{used}, which takes a share of {right:g}, and stages.{name}.gpus gives it {request.gpus:g}"
    elif request.gpus is None and name in GPU_STAGES and right > DEFAULT_GPU_SHARE:
        yield f"{used}, and gets a share of {DEFAULT_GPU_SHARE:g} at first; set stages.{name}.gpus: {right:g}"


def _artifacts(draws: Mapping[str, list[Stage]], store: Store) -> Iterator[Artifact]:
    for key in sorted({stage.key for stages in draws.values() for stage in stages}):
        artifact = store.find(key)
        if artifact is not None:
            yield artifact
