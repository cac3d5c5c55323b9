"""Rehearse a space on the real cluster: a few images through every stage of every branch, and what that says of the rest.

Everything is written to a store of its own inside the real one, so that it lies on the same disk, and removed at the end.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ktray.artifact import Artifact, Stage
from ktray.crew.needs import Runtime
from ktray.errors import PreflightFailed, StageFailed, StoppedEarly
from ktray.pipeline.sample import MARK
from ktray.stores import Store, open_store

FOLDER = ".rehearsal-"
AT_ONCE = 8
PER_IMAGE = ("images", "features", "pseudo_labels")  # stages whose artifacts grow with the number of images
SHOWN = 3


class Obtains(Protocol):
    """Any crew."""

    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, Any]]:
        """Every stage published, in order."""


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found.

    Attributes:
        nodes: how many nodes of the cluster live.
        stages: stage name -> `runs`, `seconds` of the longest, `peak_bytes` of the largest.
        pair_bytes: disk that the largest of the draws would take alone.
        free_bytes: disk that is free where the store is.
        notes: what to think about, in sentences.
    """

    nodes: int
    stages: dict[str, dict[str, Any]]
    pair_bytes: int
    free_bytes: int
    notes: list[str]


def rehearse_on(
    home: Path,
    store: Store,
    address: str | None,
    runtime: Runtime,
    draws: Mapping[str, list[Stage]],
    images: int,
    say: Callable[[str], None],
) -> Rehearsed:
    """Start Ray, or connect to it, look at every node, and rehearse.

    Args:
        draws: name of a draw, such as ``teacher=rotation: transfer.k=500`` -> its stages in small.
        images: number of images of the largest data set, for the estimate of what a whole pair takes.

    Raises:
        PreflightFailed: one paragraph with everything that is wrong.
        UserError: the home is in use, or there is no such cluster.
    """
    import ray

    from ktray.crew import client
    from ktray.crew.runtime import start, stop
    from ktray.drivers.preflight import preflight
    from ktray.drivers.stopping import hear_again
    from ktray.pipeline.execute import execute

    session = start(home, address, runtime)
    hear_again()
    try:
        for warning in session.warnings:
            say(warning)
        preflight(store, runtime)
        nodes = sum(node["Alive"] for node in ray.nodes())
        with rehearsal_store(store) as own:
            try:
                problems = rehearse(client.connect(session, own.url, execute), draws, own, store)
            except StoppedEarly as stop_early:
                problems = [f"{stop_early}."]
            stages, notes = measured(draws, own, runtime)
            largest = max((bytes_of_pair(each, own, images) for each in draws.values()), default=0)
    finally:
        stop(session)
        hear_again()
    free = shutil.disk_usage(store.root).free
    if largest > free:
        problems.append(f"One pair would take about {largest >> 20} MB of disk, and {free >> 20} MB are free.")
    if problems:
        raise PreflightFailed(" ".join(problems))
    return Rehearsed(nodes, stages, largest, free, notes)


@contextmanager
def rehearsal_store(store: Store) -> Iterator[Store]:
    """A store inside `store`, for the time of a `with`; what an earlier one left there is removed, too."""
    for left in store.root.glob(f"{FOLDER}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = store.root / f"{FOLDER}{uuid.uuid4().hex[:8]}"
    try:
        yield open_store(f"file://{folder}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rehearse(crew: Obtains, draws: Mapping[str, list[Stage]], store: Store, real: Store) -> list[str]:
    """Run the stages of each draw; one sentence per stage that failed.

    Args:
        draws: name of a draw, such as ``teacher=rotation: transfer.k=500`` -> its stages in small.
        store: where the crew of the rehearsal publishes.
        real: where artifacts lie that a loaded teacher names.
    """
    _lend(draws, store, real)
    failed: dict[str, str] = {}

    def one(name: str) -> None:
        try:
            crew.obtain(draws[name], f"rehearsal of {name}")
        except StageFailed as failure:
            failed.setdefault(f"{failure.stage.rpartition('-')[0]} fails: {failure.cause}", name)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(one, draws))
    said = [f"With {name} the stage {what.rstrip('.')}." for what, name in failed.items()]
    return said[:SHOWN] + ([f"{len(said) - SHOWN} more stages fail."] if len(said) > SHOWN else [])


def _lend(draws: Mapping[str, list[Stage]], store: Store, real: Store) -> None:
    """Let the rehearsal read artifacts that no stage of it makes."""
    made = {stage.key for stages in draws.values() for stage in stages}
    for key in {key for stages in draws.values() for stage in stages for key in stage.inputs.values()} - made:
        found = real.find(key)
        if found is not None:
            (store.root / key).symlink_to(found.directory)


def measured(draws: Mapping[str, list[Stage]], store: Store, runtime: Runtime) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Stage name -> `runs`, `seconds` of the longest and `peak_bytes` of the largest; and a word on needs that are too small.

    Peaks are the GPU's where a stage had one, else those of its process.
    """
    found: dict[str, dict[str, Any]] = {}
    for artifact in _artifacts(draws, store):
        record = artifact.record
        entry = found.setdefault(record["stage"], {"runs": 0, "seconds": 0.0, "peak_bytes": 0})
        entry["runs"] += 1
        entry["seconds"] = max(entry["seconds"], record["seconds"])
        entry["peak_bytes"] = max(entry["peak_bytes"], record["peak_bytes"])
    notes = []
    for name, entry in sorted(found.items()):
        needs = runtime.of(name)
        if needs.memory_bytes and not needs.gpus and entry["peak_bytes"] > needs.memory_bytes:
            wanted, given = entry["peak_bytes"] / 2**30, needs.memory_bytes / 2**30
            notes.append(f"{name} used {wanted:.1f} GiB on a few images, and stages.{name}.memory_bytes reserves {given:.1f}")
    return found, notes


def _artifacts(draws: Mapping[str, list[Stage]], store: Store) -> Iterator[Artifact]:
    for key in sorted({stage.key for stages in draws.values() for stage in stages}):
        artifact = store.find(key)
        if artifact is not None:
            yield artifact


def bytes_of_pair(stages: list[Stage], store: Store, images: int) -> int:
    """Disk that a whole pair would take, from what it took in small.

    Args:
        images: the number of images that its largest data set has.
    """
    total = 0.0
    for artifact in filter(None, (store.find(stage.key) for stage in stages)):
        size = sum(entry["size"] for entry in artifact.record["files"].values())
        growth = images / artifact.record["spec"][MARK] if artifact.record["stage"] in PER_IMAGE else 1.0
        total += size * max(1.0, growth)
    return int(total)
